"""Load, unload and try out models on a running server, with the key that the server was started with."""

from __future__ import annotations

import contextlib
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.server.check import check_signed
from serve.server.install import TritonError
from serve.server.regions import ADMIN_KEY_HEADER
from serve.server.settings import read_admin_key
from serve.server.state import ServerState, load_state, note_model, server_name
from unet.errors import UnetError
from unet.geometry import output_size
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

# What Triton says of a request that has to wait too long, which is no fault of the model.
_WAITING = ("Exceeds maximum queue size", "Request timeout expired")
_POLL_S, _STATISTICS_TIMEOUT_S = 0.1, 5.0


class ModelControl:
    """Model control of one server, over HTTP, which answers the holder of the admin key with TLS too.

    Args:
        state: of the server; an answer of another server on its port is refused.
        key: the admin key.
        load_timeout_s: longest wait for a model to be loaded.
    """

    def __init__(self, state: ServerState, key: str, load_timeout_s: float = 600.0) -> None:
        self._state, self._url = state, state.http_url
        self._headers = {ADMIN_KEY_HEADER: key}
        self._load_timeout_s = load_timeout_s

    @contextlib.contextmanager
    def _client(self, timeout_s: float, what: str) -> Iterator[Any]:
        from tritonclient import http
        from tritonclient.utils import InferenceServerException

        state = self._state
        client = http.InferenceServerClient(self._url, connection_timeout=timeout_s, network_timeout=timeout_s)
        try:
            if server_name(state.http_address, state.http_port, self._headers[ADMIN_KEY_HEADER]) != state.server_id:
                raise TritonError(
                    f"another server answers at {self._url} than the one that was started with this --state_dir: stop "
                    "that one, or start this one on another --http_port"
                )
            yield client
        except InferenceServerException as error:
            lines = str(error.message()).splitlines() or ["no reason given"]
            raise TritonError(f"{self._url} could not {what}: {lines[0]}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TritonError(f"{self._url} could not be asked to {what}: {reason}") from error
        finally:
            client.close()

    def load(self, model: str, version: int) -> None:
        """Load the newest version of a model, while the former one still answers.

        Raises:
            TritonError: the server does not answer, or could not load it; the former version then stays.
        """
        self._check_signed(model)
        with self._client(self._load_timeout_s, f"load {model}") as client:
            client.load_model(model, headers=self._headers)
            if not client.is_model_ready(model, str(version), headers=self._headers):
                raise TritonError(f"{self._url} loaded {model}, but not version {version}: see its log")
        note_model(self._state, model)

    def reload(self, model: str) -> None:
        """Unload and load a model, so that its processes start again.

        Raises:
            TritonError: the server does not answer, or could not load it.
        """
        self._check_signed(model)
        with self._client(self._load_timeout_s, f"reload {model}") as client:
            client.unload_model(model, headers=self._headers)
            client.load_model(model, headers=self._headers)

    def _check_signed(self, model: str) -> None:
        """Refuse what was not signed, where the server was started with --require_signature."""
        if self._state.public_key:
            try:
                check_signed(Path(self._state.repository) / model, Path(self._state.public_key))
            except UnetError as error:
                raise TritonError(f"{model} is not loaded: {error}") from error

    def canary(self, model: str, timeout_s: float) -> None:
        """Have a model segment one tile of noise of its smallest size.

        Where the tile has to wait behind others, as in a full queue, it is enough that the server's own count of
        answered requests rises meanwhile. The noise differs each time, so that no cached answer stands for the model.

        Raises:
            TritonError: the tile is not answered and no other request is, or the answer is an error or not a number.
        """
        from tritonclient.utils import InferenceServerException

        deadline = time.monotonic() + timeout_s
        with self._client(timeout_s, f"segment with {model}") as client:
            size = self._smallest_tile(client, model)
            answered = self._answered(client, model)
            try:
                probability = self._segment(client, model, size)
            except (TimeoutError, InferenceServerException) as error:
                waits = isinstance(error, TimeoutError) or any(words in str(error.message()) for words in _WAITING)
                if not waits:
                    raise
                self._await_answers(model, answered, deadline)
                return
        if probability.shape[-1] != output_size(size) or not np.isfinite(probability).all():
            raise TritonError(f"{self._url} gave no probabilities for {model}, but {probability.shape}")

    def _smallest_tile(self, client: Any, model: str) -> int:
        config = client.get_model_config(model, headers=self._headers)
        try:
            return min(int(size) for size in config["parameters"]["tile_sizes"]["string_value"].split(","))
        except (KeyError, ValueError) as error:
            raise TritonError(f"{model} names no tile sizes: publish it with serve/repository.py") from error

    def _segment(self, client: Any, model: str, size: int) -> Any:
        from tritonclient import http

        image = http.InferInput(INPUT, [1, 1, size, size], "UINT8")
        image.set_data_from_numpy(np.random.default_rng().integers(0, 256, (1, 1, size, size), np.uint8))
        return client.infer(model, [image], headers=self._headers).as_numpy(OUTPUT)

    def _answered(self, client: Any, model: str) -> int:
        """How many requests the newest version of a model has answered since it was loaded."""
        versions = client.get_inference_statistics(model, headers=self._headers)["model_stats"]
        newest = max(versions, key=lambda version: int(version["version"]))
        return int(newest["inference_stats"]["success"]["count"])

    def _await_answers(self, model: str, before: int, deadline: float) -> None:
        """Return when the model has answered more requests than ``before``; at the deadline it is looked at last."""
        while True:
            # Another connection: on the first one an answer may still come.
            with self._client(_STATISTICS_TIMEOUT_S, f"count the answers of {model}") as client:
                if self._answered(client, model) > before:
                    return
            if time.monotonic() > deadline:
                raise TritonError(f"{self._url} answered neither the canary of {model} nor any other request in time")
            time.sleep(_POLL_S)


def require_state(state_dir: Path) -> ServerState:
    """The state of the server with model control that was started with this folder.

    Raises:
        TritonError: no server runs, or it was started without model control.
    """
    state = load_state(state_dir)
    if state is None or not state.is_kept:
        raise TritonError(
            f"no server is running that was started with the --state_dir {state_dir}: start one with "
            "`python serve/triton.py start --model_control explicit`"
        )
    if state.model_control != "explicit":
        raise TritonError("the server takes no models while it runs: start it with --model_control explicit")
    return state


def control_of(state_dir: Path, repository: Path | None = None) -> ModelControl:
    """Model control of the server that was started with this folder.

    Args:
        state_dir: that folder.
        repository: what it must serve, if given.

    Raises:
        TritonError: no server runs, it was started without model control, or it serves another repository.
    """
    state = require_state(state_dir)
    if repository is not None and Path(state.repository) != repository.resolve():
        raise TritonError(f"the running server serves {state.repository}, not {repository}: publish there to load")
    return ModelControl(state, read_admin_key(Path(state.admin_key_file)))
