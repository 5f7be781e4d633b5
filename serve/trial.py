"""How a published model behaves on this machine: readiness, first answer, batching: ``python serve/trial.py``.

Serves artefacts from a folder of its own, once for each combination of queue delay, queue limit and instances, on free
ports. First as many clients as keep it busy find its capacity; then single tiles arrive at random at given rates. What
serves best within a latency budget is written down as the suggested way to publish.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from serve.measure.common import MeasureError
from serve.measure.progress import Progress
from serve.measure.trial import HEADINGS, Trial, TrialSettings, row, suggest, suggestion, try_out
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import UnetError, command, say
from unet.files import write_json
from unet.files.demo import own_or_demo

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Try every combination and print the table; one that fails does not cost the others."""
    parser = FlagParser(prog="serve/trial.py", description=__doc__)
    add_flags(parser, TrialSettings)
    settings = from_flags(TrialSettings, parser.parse_args(argv))
    settings = replace(settings, artefacts=own_or_demo(settings.artefacts, "artefacts"))
    trials: list[Trial] = []
    failures: list[str] = []
    rates = settings.rates
    say(f"| {' | '.join(HEADINGS)} |\n|{'---:|' * len(HEADINGS)}")
    with Progress(len(settings.combinations)) as progress:
        for model in settings.combinations:
            name = f"delay {model.queue_delay_us} us, queue {model.max_queue_size}, {model.instance_count} instances"
            with progress.step(name):
                try:
                    trial = try_out(settings, model, rates)
                except UnetError as error:
                    failures.append(f"{name}: {error}")
                    continue
            trials.append(trial)
            rates = tuple(load.rate for load in trial.loads)
            for load in trial.loads:
                say(f"| {' | '.join(row(trial, load))} |")
    if not trials:
        raise MeasureError(failures[0].partition(": ")[2])
    best = suggestion(*suggest(trials, settings.p99_ms), settings.p99_ms, settings.artefacts)
    write_json(settings.out, best)
    rate = best["measured"]["rate"]
    say(f"\n{rate:.1f} requests/s within {settings.p99_ms:g} ms ({settings.out}): {best['command']}")
    if failures:
        raise MeasureError(f"{len(failures)} of the combinations failed; the first is {failures[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
