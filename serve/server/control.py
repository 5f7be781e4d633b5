"""Load, unload and try out models on a running server, with the key that the server was started with."""

from __future__ import annotations

import contextlib
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.server.install import TritonError
from serve.server.settings import ADMIN_KEY_HEADER, read_admin_key
from serve.server.state import ServerState, load_state
from unet.geometry import output_size
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUEUE_FULL = "Exceeds maximum queue size"


class ModelControl:
    """Model control of one server, over HTTP: with TLS too that protocol answers whoever has the key.

    Args:
        address: that the server's HTTP listens on.
        http_port: its port.
        key: the admin key.
        load_timeout_s: longest wait for a model to be loaded.
    """

    def __init__(self, address: str, http_port: int, key: str, load_timeout_s: float = 600.0) -> None:
        self._url = f"{address}:{http_port}"
        self._headers = {ADMIN_KEY_HEADER: key}
        self._load_timeout_s = load_timeout_s

    @contextlib.contextmanager
    def _client(self, timeout_s: float, what: str) -> Iterator[Any]:
        from tritonclient import http
        from tritonclient.utils import InferenceServerException

        client = http.InferenceServerClient(self._url, connection_timeout=timeout_s, network_timeout=timeout_s)
        try:
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
        """Load a version of a model, its newest, while the former one goes on answering.

        Raises:
            TritonError: the server does not answer, or could not load it; the former version then stays.
        """
        with self._client(self._load_timeout_s, f"load {model}") as client:
            client.load_model(model, headers=self._headers)
            if not client.is_model_ready(model, str(version), headers=self._headers):
                raise TritonError(f"{self._url} loaded {model}, but not version {version}: see its log")

    def reload(self, model: str) -> None:
        """Unload and load a model, with which its processes start anew.

        Raises:
            TritonError: the server does not answer, or could not load it.
        """
        with self._client(self._load_timeout_s, f"reload {model}") as client:
            client.unload_model(model, headers=self._headers)
            client.load_model(model, headers=self._headers)

    def canary(self, model: str, timeout_s: float) -> None:
        """Have a model segment one grey tile of its smallest size; a full queue is an answer too.

        Raises:
            TritonError: there is no answer in time, or an error, or no probabilities.
        """
        from tritonclient import http

        with self._client(timeout_s, f"segment with {model}") as client:
            config = client.get_model_config(model, headers=self._headers)
            size = min(int(size) for size in config["parameters"]["tile_sizes"]["string_value"].split(","))
            image = http.InferInput(INPUT, [1, 1, size, size], "UINT8")
            image.set_data_from_numpy(np.full((1, 1, size, size), 128, np.uint8))
            try:
                answer = client.infer(model, [image], headers=self._headers).as_numpy(OUTPUT)
            except http.InferenceServerException as error:
                if _QUEUE_FULL in str(error.message()):
                    return
                raise
        if answer.shape[-1] != output_size(size) or not np.isfinite(answer).all():
            raise TritonError(f"{self._url} gave no probabilities for {model}, but {answer.shape}")


def require_state(state_dir: Path) -> ServerState:
    """The state of the server with model control that was started with this folder.

    Raises:
        TritonError: there is none, or it was started without model control.
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
        TritonError: there is none, it was started without model control, or it serves another repository.
    """
    state = require_state(state_dir)
    if repository is not None and Path(state.repository) != repository.resolve():
        raise TritonError(f"the running server serves {state.repository}, not {repository}: publish there to load")
    return ModelControl(state.http_address, state.http_port, read_admin_key(Path(state.admin_key_file)))
