"""Writers that no quick command of their own drives, called in a worker's process with the folder to write into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet.errors import command

STEPS = 3
# The middle of the image, divided by 255, with casts at both ends as an exported network has them.
_NETWORK = """
<ir_version: 8, opset_import: ["": 17]>
middle (uint8[N,1,H,W] image) => (float16[N,1,h,w] probability)
<float scale = {255.0}, int64[2] starts = {92, 92}, int64[2] ends = {-92, -92}, int64[2] axes = {2, 3}> {
    whole = Cast <to: int = 1> (image)
    inner = Slice (whole, starts, ends, axes)
    shares = Div (inner, scale)
    probability = Cast <to: int = 10> (shares)
}
"""


@command
def train(argv: Sequence[str] | None = None) -> int:
    """What training writes of a few steps: the record, the log, checkpoints and the best weights."""
    import tensorflow as tf

    from train.run.checkpoints import Checkpoints
    from train.run.folder import Run
    from train.run.log import RunLog

    assert argv is not None
    run, log, network = Run(argv[0]), RunLog(argv[0], active=True), tf.Module()
    network.weights = tf.Variable(np.zeros(4, np.float32))
    checkpoints = Checkpoints(run.folder / "checkpoints", kept=2, model=network)
    best = Checkpoints(run.folder / "best", kept=1, model=network)
    with run.locked():
        first = checkpoints.restore() if checkpoints.names() else 0
        log.rewind(first)
        run.write(settings={"seed": 1}, ranks=1)
        for step in range(first + 1, STEPS + 1):
            network.weights.assign(np.full(4, step, np.float32))
            log.event("PARAMETER", f"step {step}", number=step)
            checkpoints.save(step)
            best.save(step, threshold=0.5)
        # Of a run that ended between the two.
        if best.newest is None or best.newest[1]["step"] < STEPS:
            best.save(STEPS, threshold=0.5)
        run.write(trained={"steps": STEPS})
    return 0


@command
def export(argv: Sequence[str] | None = None) -> int:
    """What an export writes: the network, the card and its page, all of them together."""
    from export.record.folder import sole_writer
    from export.record.page import write_card
    from export.steps.graph import write_model
    from tests.serve.conftest import cropping_model, enter_engine
    from unet.card import Card
    from unet.files import atomic_directory

    assert argv is not None
    out = Path(argv[0])
    with sole_writer(out), atomic_directory(out) as aside:
        card = Card(aside)
        card.tile_sizes = (204, 252)
        write_model(cropping_model(), aside / "model.fp16.onnx")
        enter_engine(card)
        card.model = {
            "parameters": 1, "base_filters": 2, "parity_tiles": "none",
            "machine": {"cpu": "a CPU", "cores": 1, "instructions": ()},
        }  # fmt: skip
        write_card(card)
    return 0


@command
def package(argv: Sequence[str] | None = None) -> int:
    """What an export with a BioImage.IO package writes: the package beside the network in it."""
    import onnx.parser

    from export.record.folder import sole_writer
    from export.steps.bioimageio import write_package
    from export.steps.graph import write_model
    from unet.files import atomic_directory

    assert argv is not None
    network = onnx.parser.parse_model(_NETWORK)
    out, facts = Path(argv[0]), {"base_filters": 1}
    tile = np.random.default_rng(1).integers(0, 256, (1, 1, 188, 188), np.uint8)
    with sole_writer(out), atomic_directory(out) as aside:
        write_model(network, aside / "model.onnx")
        write_package(network, tile, facts, aside / "package.zip", validation="none")
    return 0


@command
def benchmark(argv: Sequence[str] | None = None) -> int:
    """What a benchmark writes: its figures for people, for tables and for programs, and its charts."""
    from serve.measure import tables
    from serve.measure.benchmark import Bench, BenchmarkSettings
    from serve.measure.rows import Row

    assert argv is not None
    bench = Bench(BenchmarkSettings(out=Path(argv[0])))
    bench.rows = [Row("engine", 572, batch, 1, 30.0, (30.0,), 9, p50_ms=33.0) for batch in (1, 8)]
    bench.write()
    tables.draw(Path(argv[0]), bench.rows)
    return 0


@command
def saved_model(argv: Sequence[str] | None = None) -> int:
    """The trained network, as the exporter takes it over."""
    from train.model.network import build_unet
    from train.model.saved_model import write_saved_model

    assert argv is not None
    model = build_unet(base_filters=1)
    model.set_weights([np.zeros_like(weights) for weights in model.get_weights()])
    write_saved_model(model, argv[0])
    return 0


@command
def curves(argv: Sequence[str] | None = None) -> int:
    """What is drawn of a run's log and of its scores."""
    from train.charts import learning_curve, threshold_curve
    from train.scoring import Tally
    from unet.scores import THRESHOLDS

    assert argv is not None
    learning_curve(argv[0])
    sums = np.ones((8, len(THRESHOLDS)))
    threshold_curve(Tally(sums), 0.5, Path(argv[0]) / "eval" / "scores.png")
    return 0


@command
def download(argv: Sequence[str] | None = None) -> int:
    """The slices of an archive; what they must be is read of those in a folder."""
    from train.download_dataset import download as fetch
    from train.download_dataset import pixels_sha256

    assert argv is not None
    folder, mirror, due = argv
    fetch(Path(folder), [mirror], {path.name: pixels_sha256(path) for path in sorted(Path(due).glob("*.tif"))})
    return 0


@command
def server_state(argv: Sequence[str] | None = None) -> int:
    """What a server keeps from one start to the next: the key of administration, and the backends side by side."""
    from serve.server.install import find_installation
    from serve.server.settings import ServerSettings, admin_key

    assert argv is not None
    state = Path(argv[0])
    state.mkdir(parents=True, exist_ok=True)
    admin_key(ServerSettings(state, state / "log", state))
    find_installation(state)
    return 0
