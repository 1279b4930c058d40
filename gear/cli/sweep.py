"""gear sweep: train and score one ablation study, and compare it with the paper's table."""

from dataclasses import dataclass

from tqdm import tqdm

from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, Parallel, UserError, changed_words, given_by
from gear.experiments.results import results, summary
from gear.experiments.studies import STUDIES, Scoring, seeds_of
from gear.experiments.sweep import commands, sweep
from gear.experiments.verdicts import directions, directions_in_words
from gear.training.loop import Runtime


@dataclass(frozen=True)
class SweepOptions(Checked):
    preset: str = "scenes"  # scenes, cifar10, cifar10-smoke, imagenet100-128 or imagenet256-l
    seeds: str = "0,1,2"  # seeds of the runs, separated by commas
    cells: str = ""  # cells of the study, separated by commas; "": all of them
    # runs trained at once; 0: one per CPU core, or on a GPU one, but one per two cores if all runs
    # are small
    jobs: Parallel = 0
    # How samples are scored.
    scoring: Scoring = Scoring()
    # also score a fresh generator on the tokenizer of each cell, as in Tables 1 to 3
    transfer: bool = False
    # train nothing; print one command per cell and seed, for a scheduler
    list: bool = False
    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    workers: Parallel = 0  # processes per run that prepare images


USAGE = Usage(
    names="STUDY",
    options=lambda names: SweepOptions(),
    examples=(
        "gear sweep temperature",
        "gear sweep depth --preset cifar10 --seeds 0",
        "gear sweep weight --preset imagenet256-l --list",
    ),
    details=(
        "STUDY is one of "
        + ", ".join(f"{name} (Table {study.table})" for name, study in STUDIES.items())
        + ". The cost is printed before anything is trained. The same command continues after an "
        "interruption."
    ),
    choices=tuple(STUDIES),
)


def command(names, arguments):
    if len(names) != 1:
        raise UserError(f"name one study: gear sweep STUDY. Known: {', '.join(STUDIES)}.")
    options = parse(SweepOptions(), arguments, "sweep")
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds)
    cells = [name for name in options.cells.split(",") if name] or None
    runtime = Runtime(device=options.device, workers=options.workers)
    if options.list:
        transfer = ["--transfer"] * options.transfer
        words = [*changed_words(options.scoring), *transfer, *changed_words(runtime)]
        print("\n".join(commands(names[0], options.preset, seeds, cells, words)))
        return
    sweep(
        names[0],
        options.preset,
        seeds,
        cells,
        options.jobs,
        options.scoring,
        runtime,
        tell=tqdm.write,
        transfer=options.transfer,
    )
    if cells is None:
        _print_results(names[0], options, seeds)


def _print_results(name, options, seeds):
    """Print the table of a complete study, and the command that draws it."""
    table = results(name, options.preset, seeds, options.scoring, options.transfer)
    print(f"\n{summary(table).to_string(na_rep='')}\n")
    print(directions_in_words(directions(table, name, options.preset)))
    parameters = {
        key: getattr(options, key)
        for key in ("preset", "seeds")
        if getattr(options, key) != getattr(SweepOptions, key)
    }
    count = options.scoring.samples(options.preset)
    parameters |= {
        "count": count if count != 1_000 else "",  # 1,000 is the notebook's default
        "reference": options.scoring.reference,
        "transfer": options.transfer,
    }
    words = [f"-p {key} {value}" for key, value in parameters.items() if value]
    print(
        f"small scale, seeds {options.seeds}; drawn by: "
        f"{' '.join(['gear figures', f'tab{STUDIES[name].table}', *words])}"
    )
