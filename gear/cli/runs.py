"""gear runs: which runs there are, and how far they are."""

from gear.config import UserError
from gear.runs.listing import readable, run_names
from gear.runs.run import Run, open_runs


def command(names, arguments):
    if arguments:
        raise UserError(f"gear runs takes names or patterns of runs, and no {arguments[0]}.")
    for run in (
        [run for name in names for run in open_runs(name)] if names else map(Run.open, run_names())
    ):
        weights = "" if run.checkpoint_steps() else "  (no weights)"
        step = readable(lambda run=run: run.step, "?")
        print(
            f"{run.name:36} {run.config.get('stage', ''):10} {step:>7} / "
            f"{run.config['steps']}{weights}"
        )
