"""gear evaluate: score the samples and reconstructions of runs, and the tokenizers of files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gear.checkpoints import is_file, open_checkpoint
from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, UserError, require
from gear.evaluation.evaluate import EvaluateOptions, evaluate_files, evaluate_run, report
from gear.evaluation.reconstruction import INTERPOLATIONS, check_public, table_18
from gear.experiments.published import published
from gear.runs.run import open_runs


@dataclass(frozen=True)
class EvaluateCommand(Checked):
    options: Annotated[EvaluateOptions, tyro.conf.arg(name="evaluation")] = EvaluateOptions()
    # 18: measure public tokenizers on ImageNet's validation set (--images), beside the numbers of
    # the paper's Table 18
    table: Literal["", "18"] = ""


USAGE = Usage(
    names="RUN [RUN ...]",
    options=lambda names: EvaluateCommand(),
    examples=(
        "gear evaluate scenes-gear-s0 --count 500",
        "gear evaluate scenes-gear-s0 --count 500 --sweep cfg_scale=1,1.5",
        "gear evaluate 'scenes-gear-*' --reconstruction",
        "gear evaluate gear-vq.pt --reconstruction --images photos --network efficientnet-lite0",
    ),
    details=(
        "RUN is the name or the pattern of runs, or a checkpoint file, whose tokenizer is measured "
        "with --reconstruction --images. The numbers of a run are kept in its metrics.json, those "
        "of files in --out. The same command continues after an interruption."
    ),
    takes_runs=True,
)


def command(names, arguments):
    if not names:
        raise UserError("name one or several runs: gear evaluate RUN.")
    parsed = parse(EvaluateCommand(), arguments, "evaluate")
    options = parsed.options
    files = [name for name in names if is_file(name)]
    for name in files:
        if not Path(name).expanduser().is_file():
            open_checkpoint(name)  # raises UserError: the path is a folder, or does not exist
    if parsed.table or files:
        if files != names:
            run_name = next(name for name in names if name not in files)
            raise UserError(
                f"'{run_name}' is no file: evaluate files and runs in separate commands."
            )
        return _evaluate_files(files, options, parsed.table)
    runs = [run for name in names for run in open_runs(name)]
    for run in runs:
        evaluate_run(run.name, options)
    report(runs)


def _evaluate_files(names, options, table):
    if table:
        require(
            not options.interpolation,
            "--table 18 measures with both of the table's interpolations: leave out "
            "--interpolation.",
        )
        for name in names:
            check_public(name)
        options = replace(options, reconstruction=True)
        records = evaluate_files(names, options, INTERPOLATIONS)
        print(table_18(records, published(int(table))).to_string(index=False))
    else:
        interpolations = (options.interpolation or "bicubic",)
        for entry in evaluate_files(names, options, interpolations):
            protocol = ", ".join(f"{k} {v}" for k, v in sorted(entry["protocol"].items()))
            print(f"{entry['metric']} {entry['value']:.5g} ({protocol})")
    print(options.out)
