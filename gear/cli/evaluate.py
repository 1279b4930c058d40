"""gear evaluate: scores of runs, and what the tokenizers of files keep of images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gear.checkpoints import is_file, open_checkpoint
from gear.cli.arguments import parse
from gear.config import Checked, UserError, require
from gear.evaluation.evaluate import EvaluateOptions, evaluate_files, evaluate_run, report
from gear.evaluation.reconstruction import INTERPOLATIONS, check_public, table_18
from gear.experiments.published import published
from gear.runs.run import open_runs


@dataclass(frozen=True)
class EvaluateCommand(Checked):
    options: EvaluateOptions = EvaluateOptions()
    # 18: public tokenizers on ImageNet's validation set (--images), beside what the paper prints
    table: Literal["", "18"] = ""


def command(names, arguments):
    if not names:
        raise UserError("name a run, or several: gear evaluate RUN.")
    parsed = parse(EvaluateCommand(), arguments)
    options, files = parsed.options, [name for name in names if is_file(name)]
    for name in files:
        if not Path(name).expanduser().is_file():
            open_checkpoint(name)  # raises: what is there instead
    if parsed.table or files:
        if files != names:
            other = next(name for name in names if name not in files)
            raise UserError(f"'{other}' is no file: files and runs are evaluated one by one.")
        return _files(files, options, parsed.table)
    runs = [run for name in names for run in open_runs(name)]
    for run in runs:
        evaluate_run(run.name, options)
    report(runs)


def _files(names, options, table):
    if table:
        require(
            not options.interpolation, "--table 18 has both of its resizes: no --interpolation."
        )
        for name in names:
            check_public(name)
        options = replace(options, reconstruction=True)
        records = evaluate_files(names, options, INTERPOLATIONS)
        print(table_18(records, published(int(table))).to_string(index=False))
    else:
        ways = (options.interpolation or "bicubic",)
        for entry in evaluate_files(names, options, ways):
            protocol = ", ".join(f"{k} {v}" for k, v in sorted(entry["protocol"].items()))
            print(f"{entry['metric']} {entry['value']:.5g} ({protocol})")
    print(options.out)
