"""Damaged artefacts: ``python -m tests.torture.artefacts --inputs 10000 --out torture.md``.

One file of an export or of a repository is damaged, and published, rolled back or looked at before the server starts.
Either a sentence names the file, or the damage changes no meaning: the same JSON value, the same protobuf message, the
same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from export.steps.training_run import TrainingRun
from serve.models.config import ModelSettings
from serve.models.publish import publish, rollback
from serve.server.check import check_repository
from tests.cards import rewrite_record
from tests.serve.conftest import cropping_model
from tests.torture.mutate import mutated
from tests.torture.report import report
from train.run.folder import Run
from unet.card import Card
from unet.card.records import Engine, Proof
from unet.engine.cpu import IR_ENTRIES
from unet.errors import UnetError, say
from unet.files import sha256_of
from unet.machine import instruction_sets
from unet.names import INT8_FILE

SETTINGS = ModelSettings(max_batch_size=8, max_tile_size=1004, backend="python")
VERDICTS = ("refused", "same meaning", "wrong")


@dataclass(frozen=True)
class Target:
    """A file that is damaged.

    Attributes:
        name: in the counts.
        path: of it.
        use: what takes it.
        meaning: what its bytes mean; raises where they mean nothing.
        entry: of a zip file, what in it is damaged.
    """

    name: str
    path: Path
    use: Callable[[], object]
    meaning: Callable[[bytes], Any]
    entry: str = ""

    def damage(self, rng: random.Random) -> bytes:
        """The file with one to four damages."""
        content = self.path.read_bytes()
        if not self.entry:
            return mutated(content, rng, name=self.path.name)
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            entries = {name: packed.read(name) for name in packed.namelist()}
        entries[self.entry] = mutated(entries[self.entry], rng)
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as packed:
            for name, data in entries.items():
                packed.writestr(name, data)
        return whole.getvalue()


def _message(content: bytes) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(content.decode(), model_config_pb2.ModelConfig()).SerializeToString(deterministic=True)


def _json(content: bytes) -> Any:
    return json.dumps(json.loads(content), sort_keys=True)


def _export(folder: Path) -> None:
    """Artefacts whose engine is an OpenVINO IR, with an ONNX file to fall back to."""
    import openvino

    folder.mkdir()
    model = folder / "model.fp16.onnx"
    onnx.save(cropping_model(), str(model))
    with tempfile.TemporaryDirectory() as name:
        openvino.save_model(openvino.convert_model(str(model)), Path(name) / IR_ENTRIES[0])
        with zipfile.ZipFile(folder / INT8_FILE, "w") as packed:
            for entry in IR_ENTRIES:
                packed.write(Path(name) / entry, entry)
    card = Card(folder)
    card.tile_sizes = (204, 252)
    card.model["threshold"] = 0.45
    proofs = {file: Proof(sha256_of(folder / file), "cpu", instruction_sets()) for file in (model.name, INT8_FILE)}
    card.record("onnx_fp16", model, None, "tests")
    card.record("int8", folder / INT8_FILE, "onnx_fp16", "tests", proof=proofs[INT8_FILE])
    card.engine = Engine("openvino", "int8", INT8_FILE, 2.0, proofs[INT8_FILE])
    card.fallback = Engine("onnxruntime", "f32", model.name, 1.0, proofs[model.name])
    card.save()


def targets(folder: Path) -> list[Target]:
    """Every kind of file, with what takes it, below an empty folder."""
    made, models, run = folder / "artefacts", folder / "models", folder / "run"
    _export(made)
    for _ in range(2):
        publish(made, models, SETTINGS)
    run.mkdir()
    settings = {"base_filters": 16, "learning_rate": 0.001, "seed": 3, "augment": True}
    record = {"settings": settings, "held_out": {"train-volume.tif": [1, 3]}, "versions": {"tensorflow": "2.15.1"}}
    trained = {"threshold": 0.6, "threshold_from": "validation"}
    rewrite_record(run, **record, repeat="python", trained=trained)

    def published() -> None:
        publish(made, folder / "elsewhere", SETTINGS)

    def gone_back() -> None:
        shutil.copytree(models, folder / "elsewhere")
        rollback(folder / "elsewhere", version=1)

    def recorded() -> None:
        TrainingRun.read(run)
        Run(run).configure({"exec_mode": "evaluate"})

    def loaded() -> None:
        check_repository(models)

    version = models / "unet" / "1"
    return [
        Target("card.json, published", made / "card.json", published, _json),
        Target("ONNX, published", made / "model.fp16.onnx", published, bytes),
        Target("OpenVINO IR, xml", made / INT8_FILE, published, bytes, entry=IR_ENTRIES[0]),
        Target("OpenVINO IR, bin", made / INT8_FILE, published, bytes, entry=IR_ENTRIES[1]),
        Target("config.pbtxt, loaded", models / "unet" / "config.pbtxt", loaded, _message),
        Target("config.pbtxt of a version, gone back to", version / "config.pbtxt", gone_back, _message),
        Target("card.json of a version, loaded", version / "card.json", loaded, _json),
        Target("card.json of a version, gone back to", version / "card.json", gone_back, _json),
        Target("ONNX of a version, gone back to", version / "model.fp16.onnx", gone_back, bytes),
        Target("config.json, exported or continued", run / "config.json", recorded, _json),
    ]


@dataclass
class Counts:
    """What came of it: verdicts by target, and what is wrong."""

    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """As Markdown."""
        lines = [f"| file | tried | {' | '.join(VERDICTS)} |", f"|---|{'---:|' * (len(VERDICTS) + 1)}"]
        for name, found in [*self.verdicts.items(), ("all", sum(self.verdicts.values(), Counter[str]()))]:
            lines.append(f"| {name} | {found.total():,} | {' | '.join(f'{found[one]:,}' for one in VERDICTS)} |")
        return "\n".join(lines)


def judge(target: Target, content: bytes, damaged: bytes) -> tuple[str, str]:
    """The verdict on a damaged file that is in its place, and what is wrong."""
    try:
        target.use()
    except UnetError as error:
        said = str(error)
        if target.path.name not in said or len(said.splitlines()) != 1:
            return "wrong", f"it is not named: {said[:200]}"
        return "refused", ""
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:200]}"
    try:
        same = target.meaning(damaged) == target.meaning(content)
    except ValueError as error:
        return "wrong", f"taken, and means nothing: {str(error)[:100]}"
    if same:
        return "same meaning", ""
    return "wrong", "taken with another meaning"


def attack(inputs: int, campaign: int, *, note: Callable[[str], None] = lambda text: None) -> Counts:
    """Damage so many files, the same share of each kind."""
    found = Counts()
    with tempfile.TemporaryDirectory(prefix="unet-artefacts-") as name:
        folder = Path(name)
        every = targets(folder)
        for target in every:
            target.use()
            shutil.rmtree(folder / "elsewhere", ignore_errors=True)
        for number in range(inputs):
            target = every[number % len(every)]
            content = target.path.read_bytes()
            damaged = target.damage(random.Random(f"{campaign} {target.name} {number}"))
            target.path.write_bytes(damaged)
            verdict, problem = judge(target, content, damaged)
            target.path.write_bytes(content)
            shutil.rmtree(folder / "elsewhere", ignore_errors=True)
            found.verdicts.setdefault(target.name, Counter())[verdict] += 1
            if problem:
                found.findings.setdefault(f"{target.name}: {problem.split(':')[0]}", f"input {number}: {problem}")
            if number % 1000 == 999:
                note(f"{number + 1:,} of {inputs:,} damaged artefacts, {len(found.findings)} kinds of faults")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.artefacts", description="Damaged artefacts.")
    parser.add_argument("--inputs", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--campaign", type=int, default=0, help="the number that all damage follows from (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(chosen.inputs, chosen.campaign, note=say)
    lines = ["", "# Damaged artefacts", "", found.table(), ""]
    lines += [f"- {kind} ({first})" for kind, first in found.findings.items()] or ["No faults."]
    return report(lines, chosen.out, found.findings)


if __name__ == "__main__":
    sys.exit(main())
