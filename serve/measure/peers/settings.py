"""What is compared, and the environment that holds libraries to fewer instructions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.measure.common import MeasureError
from serve.measure.peers.worker import SUBJECTS
from unet.config import setting

# What oneDNN calls a set of instructions, and what PyTorch's own kernels and MKL call it.
_HOLDS = {
    "AVX2": ("avx2", "AVX2"),
    "AVX512_CORE": ("avx512", "AVX512"),
    "AVX512_CORE_VNNI": ("avx512", "AVX512_E1"),
}


@dataclass(frozen=True)
class PeersSettings:
    """What is compared, and how long it is measured."""

    model_dir: Path = setting(Path("result"), "the trainer's results; demo/result where there is no result")
    artefacts: Path = setting(
        Path("artefacts"), "what was exported from them; demo/artefacts where there is no artefacts"
    )
    data: Path | None = setting(None, "8-bit stack to take tiles from; a synthetic one where not given", kind=Path)
    python: Path = setting(Path(".venv-peers/bin/python"), "where PyTorch is installed")
    subjects: tuple[str, ...] = setting(tuple(SUBJECTS), "what to measure", kind=str, choices=tuple(SUBJECTS))
    batch_sizes: tuple[int, ...] = setting((1, 8, 16), "tiles in a call", kind=int)
    tile_size: int = setting(572, "rows and columns of a tile")
    rounds: int = setting(3, "each subject is measured so many times, in turn")
    seconds: float = setting(3.0, "how long each time, for each batch size")
    limit_s: float = setting(180.0, "longest run of one process, its start included")
    isa: str = setting("", "measure each once more held to these instructions", choices=("", *_HOLDS))
    out: Path = setting(Path("peers"), "folder for the table")

    def __post_init__(self) -> None:
        if min(self.rounds, self.tile_size, *self.batch_sizes) < 1 or min(self.seconds, self.limit_s) <= 0:
            raise MeasureError("--rounds, --tile_size, --batch_sizes, --seconds and --limit_s must be positive")

    def check(self) -> None:
        """Look for everything that is needed, before anything is installed or measured.

        Raises:
            MeasureError: something is missing.
        """
        needed = [self.model_dir / "saved_model", self.artefacts / "card.json", self.artefacts / "model.onnx"]
        for path in (*needed, *([] if self.data is None else [self.data])):
            if not path.exists():
                raise MeasureError(
                    f"{path} does not exist: run `make demo` first, or train and export, and name --model_dir and "
                    "--artefacts"
                )


def held_to(isa: str) -> dict[str, str]:
    """The environment that holds libraries to an instruction set: oneDNN in all of them, and PyTorch's own kernels."""
    if not isa:
        return {}
    torch, mkl = _HOLDS[isa]
    return {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": torch, "MKL_ENABLE_INSTRUCTIONS": mkl}
