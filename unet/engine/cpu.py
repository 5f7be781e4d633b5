"""The network on a CPU: OpenVINO or ONNX Runtime behind one small class. No TensorFlow, no Triton."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.engine import EngineError
from unet.geometry import output_size
from unet.machine import instruction_sets, thread_limit, usable_cores
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from unet.card import Card
    from unet.card.records import Engine

KINDS = ("openvino", "onnxruntime")
PRECISIONS = ("bf16", "f32", "int8")
# The instructions that multiply a number format without rounding or saturation in between.
_MULTIPLY = {"bf16": ("bf16", "amx"), "int8": ("vnni", "amx")}
# OpenVINO's own format is two files; an artefact is one, a ZIP of both.
IR_ENTRIES = ("model.xml", "model.bin")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineChoice:
    """A library and the number format that it computes in: "openvino" or "onnxruntime", "bf16", "f32" or "int8"."""

    kind: str
    precision: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EngineError(f"the engine {self.kind} is unknown; there are {', '.join(KINDS)}")
        if self.precision not in PRECISIONS:
            raise EngineError(f"the precision {self.precision} is unknown; there are {', '.join(PRECISIONS)}")
        if self.kind == "onnxruntime" and self.precision != "f32":
            raise EngineError(f"ONNX Runtime computes in f32 on a CPU, not in {self.precision}")

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"


def load_engine(card: Card, threads: int | None = None) -> CpuEngine:
    """The engine that a card names, its file and its proof checked; see `engine_here` for another CPU.

    Args:
        card: of exported artefacts, or of a published version.
        threads: threads to compute with; by default as many as the library finds right within the machine's quota.

    Raises:
        CardError: the file is not what the card says, or is not proven.
        EngineError: it cannot be loaded here.
    """
    engine = engine_here(card)
    if engine != card.engine:
        proven = card.engine.proof.instructions if card.engine.proof else ()
        log.warning(
            "%s %s was proven on a CPU with %s, this one has %s: %s %s serves instead; export on this machine for the "
            "fastest engine",
            *(card.engine.kind, card.engine.precision, _words(proven), _words(instruction_sets())),
            *(engine.kind, engine.precision),
        )
    return CpuEngine(card.verify_engine(engine), EngineChoice(engine.kind, engine.precision), threads)


def engine_here(card: Card) -> Engine:
    """The engine of a card whose proof holds on this CPU: the chosen one, else the one in float32.

    Raises:
        CardError: the card names no engine.
        EngineError: neither proof holds here.
    """
    if holds_here(card.engine):
        return card.engine
    if card.fallback is None:
        raise EngineError(
            f"{card.engine.kind} {card.engine.precision} was proven on a CPU with other instructions than this one's "
            f"({_words(instruction_sets())}): run python export/main.py on this machine"
        )
    return card.fallback


def holds_here(engine: Engine) -> bool:
    """Whether an engine computes here what it computed where it was proven.

    Float32 does on every CPU, but for the order of summation, which its tolerance covers. Products of 8-bit integers
    saturate where there are no instructions for them, and bfloat16 needs its own.
    """
    proven = engine.proof.instructions if engine.proof else ()
    return native(engine.precision, proven) == native(engine.precision, instruction_sets())


def native(precision: str, instructions: Sequence[str]) -> bool:
    """Whether a CPU with such instructions, see ``instruction_sets``, multiplies a number format itself."""
    return precision == "f32" or any(name in _MULTIPLY[precision] for name in instructions)


def _words(instructions: Sequence[str]) -> str:
    return ", ".join(instructions) or "no vector instructions"


def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this CPU with instructions for it."""
    found = "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # It looks at the processor alone and not at the limit that its kernels obey.
    return found and native("bf16", instruction_sets())


def supported_choices() -> tuple[EngineChoice, ...]:
    """Every engine that computes natively on this CPU, the most promising first."""
    plain = (EngineChoice("openvino", "f32"), EngineChoice("onnxruntime", "f32"))
    return (EngineChoice("openvino", "bf16"), *plain) if has_bf16() else plain


class CpuEngine:
    """One exported network, loaded; for one thread at a time.

    Args:
        model_path: a file with the served interface, ``image`` uint8 [N, 1, H, W] to ``probability`` float16: ONNX, or
            for "int8" the ZIP that the exporter writes.
        choice: library and number format.
        threads: threads to compute with; by default as many as the library finds right within the machine's quota.

    Raises:
        EngineError: the library is missing, the CPU has not got the number format, or the file is not such a model.
    """

    def __init__(self, model_path: str | os.PathLike[str], choice: EngineChoice, threads: int | None = None) -> None:
        path = Path(model_path)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}; it must be at least 1")
        if not path.is_file():
            raise EngineError(f"{path} does not exist: write it with python export/main.py")
        if threads is None:
            threads = thread_limit()
        self.model_path = path
        self.choice = choice
        self._runner = (_OpenVino if choice.kind == "openvino" else _OnnxRuntime)(path, choice, threads)

    def infer(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Segment tiles of one size.

        Args:
            image: uint8 [N, 1, H, W], raw intensities; H and W of 188 + 16k.

        Returns:
            float16 [N, 1, H - 184, W - 184], the probability of "not membrane".

        Raises:
            EngineError: another type or number of dimensions.
            UnetError: a height or width that the network cannot take.
        """
        if image.dtype != np.uint8:
            raise EngineError(f"tiles must be uint8, these are {image.dtype}: see unet.intensity.to_uint8")
        if image.ndim != 4 or image.shape[1] != 1 or image.shape[0] < 1:
            raise EngineError(f"tiles must have the shape [N, 1, H, W], these have {list(image.shape)}")
        expected = (image.shape[0], 1, output_size(image.shape[2]), output_size(image.shape[3]))
        output = self._runner.infer(image)
        if output.shape != expected:
            raise EngineError(f"{self.model_path} gave the shape {output.shape}, due is {expected}: export it again")
        return output


class _OpenVino:
    """A lone image on all threads, several two by two, each on half of the threads.

    A pass of one image keeps more of its activations in the caches than a pass of many, and threads that share no image
    do not wait for each other at every layer.
    """

    def __init__(self, path: Path, choice: EngineChoice, threads: int | None) -> None:
        openvino = _openvino()
        core = openvino.Core()
        if choice.precision == "bf16" and not has_bf16():
            raise EngineError("this CPU has no bf16 instructions: choose the precision f32")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # What INT8 leaves over (normalisation, softmax) is quicker in f32 than converted to bf16 and back.
            "INFERENCE_PRECISION_HINT": "bf16" if choice.precision == "bf16" else "f32",
            # Pinned, several engines on one machine would take the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = _read_packed(core, path) if choice.precision == "int8" else core.read_model(path)
            ports = [(p.any_name, p.get_element_type().get_type_name()) for p in (*model.inputs, *model.outputs)]
            _check_interface(path, ports, ("u8", "f16"))
            self._alone = core.compile_model(model, "CPU", settings).create_infer_request()
            self._pair: list[Any] = []
            if (usable_cores() if threads is None else threads) > 1:
                paired = core.compile_model(model, "CPU", {**settings, "NUM_STREAMS": 2})
                self._pair = [paired.create_infer_request() for _ in range(2)]
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {path}: {_first_line(error)}") from error

    def infer(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        paired = len(image) - len(image) % 2 if self._pair else 0
        answers: list[np.ndarray[Any, Any]] = []
        for first in range(0, paired, 2):
            answers += self._pass(self._pair, image[first : first + 2])
        for first in range(paired, len(image)):
            answers += self._pass([self._alone], image[first : first + 1])
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _pass(self, requests: list[Any], image: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """The answers to one image by each of some requests, at the same time."""
        started = []
        try:
            for index, request in enumerate(requests):
                request.start_async({INPUT: image[index : index + 1]}, share_inputs=True)
                started.append(request)
        finally:
            for request in started:
                request.wait()
        return [request.get_output_tensor().data.copy() for request in requests]


class _OnnxRuntime:
    def __init__(self, path: Path, choice: EngineChoice, threads: int | None) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of its own
            raise EngineError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        ports = [(p.name, p.type) for p in (*session.get_inputs(), *session.get_outputs())]
        _check_interface(path, ports, ("tensor(uint8)", "tensor(float16)"))
        self._session = session

    def infer(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(self._session.run([OUTPUT], {INPUT: image})[0])


def _read_packed(core: Any, path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as packed:
            description, weights = (packed.read(name) for name in IR_ENTRIES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise EngineError(f"{path} is not an INT8 engine ({error}): export it with python export/main.py") from error
    return core.read_model(description, weights)


def _check_interface(path: Path, ports: list[tuple[str, str]], types: tuple[str, str]) -> None:
    expected = [(INPUT, types[0]), (OUTPUT, types[1])]
    if ports != expected:
        raise EngineError(
            f"{path} has the inputs and outputs {ports} where {expected} are due: export it with python export/main.py"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineError("OpenVINO is not installed: pip install 'unet-medical-triton[serve]'") from error
    return openvino


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("ONNX Runtime is not installed: pip install 'unet-medical-triton[serve]'") from error
    return onnxruntime
