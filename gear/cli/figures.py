"""gear figures: execute notebooks, and write their figures and the gallery of all figures."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, Jobs, TrainingStopped, given_by
from gear.experiments.studies import seeds_of
from gear.figures.gallery import write_gallery
from gear.figures.render import INTERACTIVE, names_of, products, render


@dataclass(frozen=True)
class FigureOptions(Checked):
    force: bool = False  # draw figures again that are up to date
    jobs: Jobs = 1  # number of notebooks executed at once
    # seeds of the runs to draw, such as 0 or 0,1; "": those that the notebook names
    seeds: str = ""
    # name and value of one parameter of the notebooks
    parameters: Annotated[
        tuple[tuple[str, str], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(aliases=["-p"], metavar="KEY VALUE"),
    ] = ()


USAGE = Usage(
    names="[NOTEBOOK ...]",
    options=lambda names: FigureOptions(),
    examples=(
        "gear figures",
        "gear figures fig3",
        "gear figures fig5 -p images 200",
        "gear figures tab5",
    ),
    details=(
        "Without a name, every notebook is executed that needs no weights. A figure that is up to "
        "date is not drawn again. Figures are written to figures/, or to $GEAR_FIGURES; "
        "index.html there shows all of them."
    ),
    choices=tuple(sorted({*INTERACTIVE}.union(*map(names_of, products())))),
)


def command(names, arguments):
    options = parse(FigureOptions(), arguments, "figures")
    failure = None
    with given_by("--seeds"):
        seeds = seeds_of(options.seeds) if options.seeds else ()
    try:
        render(names, options.force, dict(options.parameters), options.jobs, seeds)
    except TrainingStopped as error:  # the gallery shows the figures that could be drawn
        failure = error
    print(f"gallery: {write_gallery()}")
    if failure:
        raise failure
