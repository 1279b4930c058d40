"""gear figures: notebooks, executed, and the page of all figures."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from gear.cli.arguments import parse
from gear.config import Checked, Jobs, TrainingStopped, given_by
from gear.experiments.studies import seeds_of
from gear.figures.gallery import write_gallery
from gear.figures.render import render


@dataclass(frozen=True)
class FigureOptions(Checked):
    force: bool = False  # redraw what is up to date too
    jobs: Jobs = 1  # notebooks executed at once
    seeds: str = ""  # of the runs that are drawn, as in 0 or 0,1; "": those that the notebooks name
    parameters: Annotated[
        tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-p"])
    ] = ()
    # ^ KEY VALUE of the one notebook that is named; may be repeated


def command(names, arguments):
    options, stopped = parse(FigureOptions(), arguments), None
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds) if options.seeds else ()
    try:
        render(names, options.force, dict(options.parameters), options.jobs, seeds)
    except TrainingStopped as failures:  # what could be drawn is shown all the same
        stopped = failures
    print(f"gallery: {write_gallery()}")
    if stopped:
        raise stopped
