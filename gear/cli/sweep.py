"""gear sweep: one of the paper's ablations, trained, scored and compared with the paper's table."""

from dataclasses import dataclass

from tqdm import tqdm

from gear.cli.arguments import parse
from gear.config import Checked, Parallel, Samples, UserError, given_by
from gear.experiments.results import results, summary
from gear.experiments.studies import STUDIES, seeds_of
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
    count: Samples = 1_000  # samples that a cell is scored by
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
    if options.list:
        values = {"count": options.count, "device": options.device, "workers": options.workers}
        more = [
            w
            for key, value in values.items()
            if value != getattr(SweepOptions, key)
            for w in (f"--{key}", str(value))
        ]
        print("\n".join(commands(names[0], options.preset, seeds, cells, more)))
        return
    runtime = Runtime(device=options.device, workers=options.workers)
    sweep(names[0], options.preset, seeds, cells, options.jobs, options.count, runtime, tqdm.write)
    if cells is None:
        table = results(names[0], options.preset, seeds, options.count)
        print(f"\n{summary(table).to_string(na_rep='')}\n")
        print(directions_in_words(directions(table, names[0], options.preset)))
        values = {"preset": options.preset, "seeds": options.seeds, "count": options.count}
        more = "".join(
            f" -p {key} {value}"
            for key, value in values.items()
            if value != getattr(SweepOptions, key)
        )
        print(
            f"small scale, seeds {options.seeds}; drawn by: gear figures ablations -p study "
            f"{names[0]}{more}"
        )
