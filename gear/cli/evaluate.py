"""gear evaluate: scores of runs."""

from gear.cli.arguments import parse
from gear.config import UserError
from gear.evaluation.evaluate import EvaluateOptions, evaluate, report
from gear.runs.run import open_runs


def command(names, arguments):
    if not names:
        raise UserError("name a run, or several: gear evaluate RUN.")
    options, runs = (
        parse(EvaluateOptions(), arguments),
        [run for name in names for run in open_runs(name)],
    )
    for run in runs:
        evaluate(run.name, options)
    report(runs)
