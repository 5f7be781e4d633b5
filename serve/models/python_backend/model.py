"""Triton's python backend for machines without a GPU: published as ``model.py`` beside the weights of each version."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The modules that this version was published with lie beside this file: it needs no installed project, and runs as it
# was published whatever is installed. The version stays as it was, without bytecode.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

from unet.card import Card  # noqa: E402
from unet.engine.cpu import load_engine  # noqa: E402
from unet.engine.memory import TileLimit, bytes_per_pixel  # noqa: E402
from unet.errors import UnetError  # noqa: E402
from unet.machine import usable_cores  # noqa: E402
from unet.names import INPUT, OUTPUT  # noqa: E402


class TritonPythonModel:
    """One instance of the network on a CPU engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the version's files against their card and load the engine that the card names."""
        folder = Path(args["model_repository"]) / args["model_version"]
        card = Card.load(folder)
        config = json.loads(args["model_config"])
        threads = _threads(config)
        self._engine = load_engine(card, threads)
        self._limit = TileLimit(
            # A version that is served on beside a newer one has the newer one's configuration.
            side=int(config["parameters"].get("max_tile_size", {}).get("string_value", max(card.tile_sizes))),
            usual_side=max(card.tile_sizes),
            pixel_bytes=bytes_per_pixel(self._engine.choice, card.model.get("base_filters")),
        )
        pb_utils.Logger.log_info(
            f"{args['model_name']} version {args['model_version']}: {self._engine.choice}, {threads} threads"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton batched: those of one tile size in one pass of the engine."""
        images = [pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        responses: list[Any] = [None] * len(requests)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            sizes.setdefault(image.shape[2:], []).append(index)
        for members in sizes.values():
            try:
                batch = images[members[0]] if len(members) == 1 else np.concatenate([images[i] for i in members])
                output = self._infer(batch)
            except (UnetError, MemoryError, RuntimeError) as error:
                ours = not isinstance(error, UnetError)
                code = pb_utils.TritonError.INTERNAL if ours else pb_utils.TritonError.INVALID_ARG
                failure = pb_utils.TritonError(str(error) or type(error).__name__, code)
                for index in members:
                    responses[index] = pb_utils.InferenceResponse(error=failure)
                continue
            first = 0
            for index in members:
                part = output[first : first + len(images[index])]
                first += len(part)
                responses[index] = pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUT, part)])
        return responses

    def _infer(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The engine's answer, in as many passes as keep its memory within the limit."""
        at_once = self._limit.images_at_once(batch.shape[2], batch.shape[3])
        parts = [self._engine.infer(batch[first : first + at_once]) for first in range(0, len(batch), at_once)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _threads(config: dict[str, Any]) -> int:
    """The configured threads, or this instance's share of the cores that the process may use."""
    parameters = {name: int(config["parameters"][name]["string_value"]) for name in ("threads", "core_shares")}
    return parameters["threads"] or max(1, usable_cores() // parameters["core_shares"])
