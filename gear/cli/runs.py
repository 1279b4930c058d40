"""gear runs: list the runs, and how far each is trained."""

from gear.cli.usage import Usage
from gear.config import UserError
from gear.runs.listing import readable, run_names
from gear.runs.run import Run, open_runs

USAGE = Usage(
    names="[RUN ...]",
    examples=("gear runs", "gear runs 'scenes-gear-*'"),
    details=(
        "RUN is a name or a pattern; without one, all runs are listed. Runs lie in runs/, or in "
        "$GEAR_RUNS. One marked (no weights) cannot sample: it is a record of a finished run, or "
        "has no checkpoint yet."
    ),
    takes_runs=True,
)


def command(names, arguments):
    if arguments:
        raise UserError(
            f"gear runs takes names or patterns of runs, and no {arguments[0]}: there are no "
            "options."
        )
    runs = (
        [run for name in names for run in open_runs(name)] if names else map(Run.open, run_names())
    )
    for run in runs:
        weights = "" if run.checkpoint_steps() else "  (no weights)"
        step = readable(lambda run=run: run.step, "?")
        print(
            f"{run.name:36} {run.config.get('stage', ''):10} {step:>7} / "
            f"{run.config['steps']}{weights}"
        )
