"""What a server runs, and on what: its engine in this process, its threads, and the machine in words."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from serve.measure.common import MeasureError
from serve.measure.meter import server_process
from unet.card import CARD_FILE, Card
from unet.engine.cpu import load_engine
from unet.files import sha256_of
from unet.machine import machine, run_tool, usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serve.measure.levels import Infer
    from serve.segment.connection import Connection


def instance_threads(connection: Connection) -> int:
    """Threads that one instance of a served CPU model computes with, as Triton's backend counts them."""
    parameters = connection.client.get_model_config(connection.model_name).config.parameters
    threads, shares = (int(parameters[name].string_value or 0) for name in ("threads", "core_shares"))
    if threads:
        return threads
    server = server_process(connection.url)
    cores = usable_cores() if server is None else min(usable_cores(), len(server.cpu_affinity()))
    return max(1, cores // max(1, shares))


@contextlib.contextmanager
def served_engine(artefacts: Path, connection: Connection) -> Iterator[Infer]:
    """The engine that a server runs, in this process: for a CPU profile the card's, else the plan on the GPU.

    A CPU engine gets as many threads as an instance of the server has.

    Args:
        artefacts: folder that the exporter wrote; the served version must be made of it.
        connection: to the served model.

    Raises:
        MeasureError: there are no such artefacts, or the server serves others.
        UnetError: the engine cannot be loaded here.
    """
    path = artefacts / CARD_FILE
    if not path.is_file():
        raise MeasureError(f"{path} does not exist: name the served artefacts with --artefacts")
    parameters = connection.client.get_model_config(connection.model_name).config.parameters
    if parameters["card_sha256"].string_value != sha256_of(path):
        raise MeasureError(f"{connection.url} does not serve {artefacts}: publish it, or name what it serves")
    if parameters["profile"].string_value != "cpu":
        from unet.engine.plan import PlanRunner

        with PlanRunner.load(artefacts) as runner:
            yield runner.infer
        return
    yield load_engine(Card.load(artefacts), instance_threads(connection)).infer


def gpu_name() -> str:
    """The first GPU of this machine, empty if there is none."""
    said = run_tool("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said and said.strip() else ""


def machine_in_words() -> str:
    """What this runs on: the processor, and the GPU if there is one."""
    return ", ".join(filter(None, (str(machine()), gpu_name())))
