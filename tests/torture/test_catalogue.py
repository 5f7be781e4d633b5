"""Every class of error is provoked through a command: one sentence, an exit code, no traceback, finished work kept."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import tifffile

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from tests.cards import rewrite_record
from tests.export.conftest import write_random_saved_model
from unet.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
# Where nothing listens.
NOWHERE = "http://127.0.0.1:9/"
OFFLINE = {"PIP_INDEX_URL": NOWHERE, "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
Line = list[str]


@dataclass(frozen=True)
class Place:
    """What a provocation may use: a folder with finished work, artefacts, and a server's address."""

    folder: Path
    artefacts: Path
    url: str

    @property
    def models(self) -> Path:
        """A repository with one version."""
        publish(self.artefacts, self.folder / "models", ModelSettings())
        return self.folder / "models"

    @property
    def stack(self) -> Path:
        """Two slices, and a result of theirs."""
        for name in ("v", "v-mask"):
            tifffile.imwrite(self.folder / f"{name}.tif", np.zeros((2, 40, 30), np.uint8), photometric="minisblack")
        return self.folder / "v.tif"


def client(place: Place, *flags: str) -> Line:
    return ["serve.client", str(place.stack), "--url", place.url, *flags]


def damaged_card(place: Place) -> Line:
    models = place.models
    (folder := place.folder / "damaged").mkdir()
    (folder / "card.json").write_text((place.artefacts / "card.json").read_text()[:-40])
    return ["serve.repository", "--artefacts", str(folder), "--model_repository", str(models)]


def broken_stack(place: Place) -> Line:
    source = place.stack
    source.write_bytes(source.read_bytes()[:-2000])
    return ["serve.client", str(source), "--url", place.url]


def unsigned(place: Place) -> Line:
    key = place.folder / "key.pub"
    key.write_text("untrusted comment: no key\nAAAA\n")
    words = ["--artefacts", str(place.artefacts), "--require_signature", str(key)]
    return ["serve.repository", *words, "--model_repository", str(place.models)]


def dead_server(place: Place) -> Line:
    url = f"127.0.0.1:{free_ports(1)[0]}"
    return ["serve.client", str(place.stack), "--url", url, "--patience_s", "0", "--timeout_s", "2"]


def empty_repository(place: Place) -> Line:
    (empty := place.folder / "empty").mkdir()
    return ["serve.triton", "start", "--model_repository", str(empty), "--state_dir", str(place.folder / "state")]


def untrained(place: Place) -> Line:
    (place.folder / "run").mkdir()
    (place.folder / "run" / "config.json").write_text("[]")
    return ["export.main", "--model_dir", str(place.folder / "run"), "--out", str(place.folder / "artefacts")]


def beyond_float16(place: Place) -> Line:
    run = place.folder / "run"
    write_random_saved_model(run / "saved_model", poison=6e4)
    rewrite_record(run, settings={}, versions={}, repeat="", trained={})
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 60), np.uint8)
    tifffile.imwrite(place.folder / "train-volume.tif", images, photometric="minisblack")
    words = ["--out", str(place.folder / "artefacts"), "--tile_sizes", "204", "--target", "v100"]
    return ["export.main", "--model_dir", str(run), "--data_dir", str(place.folder), *words]


def somebody_elses(place: Place, *words: str) -> Line:
    (out := place.folder / "out").mkdir()
    (out / "thesis.tex").write_text("years of work")
    return [*words, "--out", str(out)]


def reinstall(place: Place) -> Line:
    return ["tools.install_horovod", "--version", "0.0.1", "--wheels", str(place.folder / "wheels")]


def not_locked(place: Place) -> Line:
    (place.folder.parent / "constraints.txt").write_text("numpy==1.26.4\n")
    with ZipFile(wheel := place.folder / "x-1-py3-none-any.whl", "w") as packed:
        packed.writestr("x-1.dist-info/METADATA", "Name: x\nVersion: 1\nRequires-Dist: unheard-of\n")
    return ["tools.sbom", "--out", str(place.folder / "sbom"), "wheel", str(wheel)]


CATALOGUE: dict[str, tuple[Callable[[Place], Line], str]] = {
    "UnetError": (
        lambda place: ["unet.scores.__main__", str(place.stack), str(place.stack), "--threshold", "2"],
        "--threshold is 2; it must be from 0 to 1",
    ),
    "CardError": (damaged_card, "card.json cannot be read as a card"),
    "StackError": (broken_stack, "v.tif"),
    "SignatureError": (unsigned, "key.pub is not a public key"),
    "EngineError": (
        lambda place: ["export.gpu_report", "--artefacts", str(place.artefacts), "--target", "v100"],
        "tensorrt cannot be loaded",
    ),
    "ClientError": (lambda place: client(place, "--output", "mask"), "v-mask.tif exists already"),
    "ServerError": (dead_server, "127.0.0.1"),
    "CudaMemoryError": (lambda place: client(place, "--shared_memory", "cuda"), "GPU"),
    "RepositoryError": (
        lambda place: ["serve.repository", "--rollback", "--model_repository", str(place.models)],
        "no version that differs from the present one",
    ),
    "TritonError": (empty_repository, "holds no model"),
    "MeasureError": (
        lambda place: ["serve.scaling", "--benchmark", str(place.stack), "--out", str(place.folder / "scaling.json")],
        "is not what serve/benchmark.py writes",
    ),
    "ExportError": (untrained, "has no saved_model"),
    "ParityError": (beyond_float16, "computed in float16, logits/Conv overflows"),
    "TrainError": (
        lambda place: ["train.download_dataset", "--data_dir", str(place.folder / "data"), "--mirror", NOWHERE],
        "the slices could not be fetched",
    ),
    "DemoError": (
        lambda place: somebody_elses(place, "tools.demo", "--data_dir", str(place.folder)),
        "holds something that a former `make demo` did not write",
    ),
    "TissueError": (
        lambda place: somebody_elses(place, "tools.tissues"),
        "holds something that a former `make tissues` did not write",
    ),
    "HelmError": (
        lambda place: ["tools.install_helm", "--out", str(place.folder / "helm")],
        "could not be downloaded",
    ),
    "NnunetError": (
        lambda place: ["tools.nnunet", "--python", str(place.folder / "python"), "--out", str(place.folder / "nnunet")],
        "python does not exist: `make nnunet` installs nnU-Net",
    ),
    "SbomError": (not_locked, "constraints.txt has no version of unheard-of"),
    "BuildError": (reinstall, "Horovod could not be installed"),
}


def error_classes() -> set[str]:
    """The root error, and what is derived from it, by the text of the whole tree."""
    bases: dict[str, set[str]] = {}
    for room in ("unet", "train", "export", "serve", "tools"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    found, more = set[str](), {"UnetError"}
    while more - found:
        found |= more
        more = {name for name, those in bases.items() if those & found}
    return found


def test_the_catalogue_provokes_every_class() -> None:
    assert set(CATALOGUE) == error_classes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_error_is_a_sentence(name: str, tmp_path: Path, tiny_artefacts: Path, triton_server: TritonServer) -> None:
    (work := tmp_path / "work").mkdir()
    make, words = CATALOGUE[name]
    line = make(Place(work, tiny_artefacts, triton_server.settings.grpc_url))
    before = contents(work)
    environment = {**os.environ, **OFFLINE, "RAISED": str(tmp_path / "raised"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.torture.raised", *line]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    # A class that its caller turns into another one counts as well.
    assert name in (tmp_path / "raised").read_text().splitlines()
    # Of what a child process says before, as pip does, the last line counts.
    *rest, said = done.stderr.strip().splitlines()
    assert said.startswith("error: ")
    assert words in said
    assert "Traceback" not in done.stderr
    assert not [line for line in rest if line.startswith("error: ")]
    after = contents(work)
    assert {path: after.get(path) for path in before} == before
