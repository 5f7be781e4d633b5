"""What the page about a run shows, section by section."""

from __future__ import annotations

import dataclasses
import html
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.charts import curve_figure
from train.config import config_of, default_of
from train.cross_validate import FIGURES, TITLES, folds_in, with_means
from train.errors import TrainError
from train.input.split import load_data
from train.modes import CHOSEN_ON, trained_predictor
from train.report.slices import BOTH, LINE, MERGED, PICTURED, SPLIT, Scored, score_slices, together, worst_first
from train.run.folder import Run
from train.run.log import read_log
from unet.files import atomic_file
from unet.page import grid, svg, table
from unet.scores.truth import MERGE_AND_SPLIT_RULE

if TYPE_CHECKING:
    from train.cross_validate import Fold
    from train.input.split import Data

PAGE = Path(__file__).with_name("page.html")
# So many lines has the table of slices.
_LISTED = 40
_NAMES = {"v_rand": "V_rand", "v_info": "V_info", "dice": "Dice of the membrane", "pixel_error": "pixel error"}


def write_report(model_dir: Path, data_dir: str | None, out: Path) -> str:
    """Write the page, whole or not at all.

    Args:
        model_dir: folder of a run, or of all folds.
        data_dir: folder of the stacks; None for the one that the run names.
        out: the page.

    Returns:
        What is on it, in words.

    Raises:
        TrainError: if the folder holds no run, or the data are not the run's.
        StackError: if a stack cannot be read.
    """
    run, folds = Run(model_dir), [fold for fold in folds_in(model_dir) if Run(fold.folder).record]
    if run.record:
        shown = _Shown(run, data_dir)
        sections, said = [*shown.sections(), *_slices(shown.scored, shown.about)], f"{len(shown.scored)} slices"
    elif folds:
        each = [_Shown(Run(fold.folder), data_dir, f"fold {fold.number}, ") for fold in folds]
        scored = worst_first(one for shown in each for one in shown.scored)
        about = "Each fold's network on the slices that it held out."
        sections = [_folds(folds), *_slices(scored, about)]
        sections += [section for shown in each for section in shown.sections()]
        said = f"{len(folds)} folds, {len(scored)} slices"
    else:
        raise TrainError(
            f"{model_dir} holds no training run: name the --model_dir of one, or of train/cross_validate.py"
        )
    page = PAGE.read_text(encoding="utf-8").replace("@TITLE@", html.escape(f"Training in {model_dir}"))
    with atomic_file(out) as aside:
        aside.write_text(page.replace("@SECTIONS@", "\n".join(sections)), encoding="utf-8")
    return said


class _Shown:
    """A run on the page: looked at, and its slices scored.

    Attributes:
        scored: the slices that it held out, the worst first; where it held out none, its validation slices.
        about: what these slices are, as a sentence.
    """

    def __init__(self, run: Run, data_dir: str | None, prefix: str = "") -> None:
        self._run, self._prefix = run, prefix
        self._config = config_of({**run.record["settings"], **({} if data_dir is None else {"data_dir": data_dir})})
        self._data = load_data(self._config, run.record)
        self.scored: list[Scored] = []
        items = self._data.held_out or self._data.validation
        if run.best().newest is None and run.checkpoints().newest is None:
            self.about = "The run has saved no weights yet, so nothing can be scored."
        elif not items:
            self.about = "The run held no slices out: train with --crossvalidation_idx to have some scored."
        else:
            self.about = (
                "Slices that the run held out: training did not see them."
                if self._data.held_out
                else "The run held no slices out. These are its validation slices, which chose its weights and its "
                "threshold: expect less of other slices."
            )
            self.scored = score_slices(trained_predictor(self._config, [run]), items, run.threshold, prefix)

    def sections(self) -> list[str]:
        """How the run went, and what it was."""
        steps, rates = 0, []
        for step, data in read_log(self._run.folder):
            steps = max(steps, step) if isinstance(step, int) else steps
            rates += [data["img_per_s"]] if "img_per_s" in data else []
        trained = self._run.record.get("trained", {})
        ended = trained.get("steps") == steps
        facts = {"steps" if ended else f"of {self._config.max_steps} steps, not finished": str(steps)}
        if self.scored:
            facts |= {
                _NAMES[name]: f"{value:.4f}" for name, value in together(self.scored, self._run.threshold).items()
            }
        if rates:
            facts["images a second in training"] = f"{statistics.median(rates):.1f}"
        note = "<p>Scores are those of all slices of this run below, at its threshold.</p>" if self.scored else ""
        figures = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(name)}</div>" for name, value in facts.items())
        curve = curve_figure(self._run.folder)
        drawn = "<p>The log has no loss yet.</p>" if curve is None else f'<img src="{svg(curve)}" alt="learning curve">'
        of = self._prefix.rstrip(", ") or "The run"
        return [
            f"<h2>{of[0].upper()}{of[1:]}</h2><div class='glance'>{figures}</div>{note}"
            f"<div class='side'><figure>{drawn}</figure><div>{table(self._facts())}</div></div>"
        ]

    def _facts(self) -> dict[str, Any]:
        """Data and settings in short."""
        record, data = self._run.record, self._data
        trained = record.get("trained", {})
        used = {"weights": f"{trained['weights']}, of step {trained['weights_step']}"} if trained else {}
        settings = {
            name: value
            for name, value in dataclasses.asdict(self._config).items()
            if value != default_of(name) and name not in ("model_dir", "data_dir", "exec_mode", "resume")
        }
        return {
            "data": f"{', '.join(data.splits)} in {self._config.data_dir}",
            "slices": _counts(data),
            **used,
            "threshold": f"{self._run.threshold:g}, chosen on {CHOSEN_ON[self._run.threshold_from]}",
            "ranks": record.get("ranks", 1),
            "precision": record.get("precision", ""),
            "settings beside the defaults": ", ".join(f"{name} {value}" for name, value in settings.items()),
        }


def _counts(data: Data) -> str:
    parts = {"trained on": data.training, "for validation": data.validation, "held out": data.held_out}
    shape = " x ".join(str(side) for side in data.training[0].label.shape)
    return f"{', '.join(f'{len(items)} {name}' for name, items in parts.items())}; {shape} pixels"


def _folds(folds: list[Fold]) -> str:
    """The scores of the folds that have some."""
    rows = {str(fold.number): fold.scores() for fold in folds if fold.is_scored}
    missing = [str(fold.number) for fold in folds if not fold.is_scored]
    note = f"<p>Not scored yet: fold {', '.join(missing)}.</p>" if missing else ""
    lines = with_means(rows) if len(rows) > 1 else rows
    cells = [[name, *(f"{row[key]:.4f}" for key in FIGURES)] for name, row in lines.items()]
    return f"<h2>Folds</h2>{note}{grid(['fold', *TITLES], cells)}"


def _slices(scored: list[Scored], about: str) -> list[str]:
    """The table of slices, and pictures of the worst."""
    heading = f"<h2>Slices, the worst first</h2><p>{html.escape(about)}</p>"
    if not scored:
        return [heading]
    cells = [
        [one.name, *(f"{one.scores[name]:.4f}" for name in _NAMES), str(one.marks.merged), str(one.marks.split)]
        for one in scored[:_LISTED]
    ]
    more = f"<p>{len(scored) - _LISTED} better ones are not listed.</p>" if len(scored) > _LISTED else ""
    listed = grid(["slice", *_NAMES.values(), "cells merged", "cells split"], cells)
    figures = "".join(
        f'<figure><img src="{one.marks.picture}" alt="{html.escape(one.name)}"><figcaption>{html.escape(one.name)}: '
        f"V_rand {one.scores['v_rand']:.4f}, {one.marks.merged} merged, {one.marks.split} split</figcaption></figure>"
        for one in scored[:PICTURED]
    )
    names = {"merged with another": MERGED, "split": SPLIT, "both": BOTH, "the membrane that was found, thinned": LINE}
    keys = "".join(f'<span class="key" style="background:rgb{colour}"></span>{name}' for name, colour in names.items())
    return [
        f"{heading}{listed}{more}",
        f"<h2>Cells that are merged or split</h2><p>{keys}</p><p class='rule'>{MERGE_AND_SPLIT_RULE}</p>"
        f"<div class='side'>{figures}</div>",
    ]
