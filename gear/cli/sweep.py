"""gear sweep: one of the paper's ablations, trained, scored and compared with the paper's table."""

from dataclasses import dataclass

from tqdm import tqdm

from gear.cli.arguments import parse
from gear.config import Checked, Parallel, UserError, changed_words, given_by
from gear.experiments.results import results, summary
from gear.experiments.studies import STUDIES, Scoring, seeds_of
from gear.experiments.sweep import commands, sweep
from gear.experiments.verdicts import directions, directions_in_words
from gear.training.loop import Runtime


@dataclass(frozen=True)
class SweepOptions(Checked):
    preset: str = "scenes"  # scenes, cifar10, cifar10-smoke, imagenet100-128, imagenet256-l
    seeds: str = "0,1,2"
    cells: str = ""  # some of the study's, with commas between; "": all
    # at once; 0: one a core, on a GPU one, and there small runs one for two cores
    jobs: Parallel = 0
    scoring: Scoring = Scoring()
    # score a fresh generator on each cell's tokenizer, too, as in Tables 1 to 3
    transfer: bool = False
    list: bool = False  # print one command a cell and seed for a scheduler, and run nothing
    device: str = "auto"  # or "cpu", "cuda", "cuda:1"
    workers: Parallel = 0  # processes that prepare images, a run


def command(names, arguments):
    if len(names) != 1:
        raise UserError(f"name one study: gear sweep STUDY. Known: {', '.join(STUDIES)}.")
    options = parse(SweepOptions(), arguments)
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds)
    cells = [c for c in options.cells.split(",") if c] or None
    scoring, runtime = options.scoring, Runtime(device=options.device, workers=options.workers)
    transferred = ["--transfer"] * options.transfer
    if options.list:
        words = [*changed_words(scoring), *transferred, *changed_words(runtime)]
        print("\n".join(commands(names[0], options.preset, seeds, cells, words)))
        return
    sweep(
        names[0],
        options.preset,
        seeds,
        cells,
        options.jobs,
        scoring,
        runtime,
        tell=tqdm.write,
        transfer=options.transfer,
    )
    if cells is None:
        table = results(names[0], options.preset, seeds, scoring, options.transfer)
        print(f"\n{summary(table).to_string(na_rep='')}\n")
        print(directions_in_words(directions(table, names[0], options.preset)))
        more = [
            f"-p {key} {getattr(options, key)}"
            for key in ("preset", "seeds")
            if getattr(options, key) != getattr(SweepOptions, key)
        ]
        count = scoring.samples(options.preset)
        parameters = dict(
            count=count if count != 1_000 else "",  # the notebook's own
            reference=scoring.reference,
            transfer=options.transfer,
        )
        more += [f"-p {key} {value}" for key, value in parameters.items() if value]
        print(
            f"small scale, seeds {options.seeds}; drawn by: "
            f"{' '.join(['gear figures ablations -p study', names[0], *more])}"
        )
