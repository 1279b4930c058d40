"""gear train: train runs by recipe name, after their missing parents."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from gear.checkpoints import is_file
from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, Jobs, UserError, given_by
from gear.cost.dry_run import dry_run
from gear.cost.price import Utilisation
from gear.experiments.jobs import train_many
from gear.experiments.recipes import (
    CONFIGS,
    METHODS,
    PRESETS,
    RECIPES,
    check_teachers,
    known,
    plan,
    recipe,
    train_with_parents,
    with_parts,
)
from gear.runs.folder import run_path
from gear.runs.run import Run
from gear.training.loop import Runtime
from gear.training.settings import Config


@dataclass(frozen=True)
class TrainOptions(Checked):
    # The fields that define a run, and so its result. To change one, give the run a label or a
    # name: a run is never continued with other values.
    config: Annotated[Config, tyro.conf.arg(name="the science")]
    # How a run is executed. A run may be stopped with some of these values and continued with
    # others.
    runtime: Annotated[Runtime, tyro.conf.arg(name="how it is run")] = field(
        default_factory=Runtime
    )
    name: str = ""  # name of the run; "": the name of the recipe, with the label if there is one
    # a word to append to the name of the run, and of each parent that the changes concern
    label: str = ""
    # keep the preset's image size in the warm-up, so that one warm-up serves runs of all sizes
    share_warm_up: bool = False
    jobs: Jobs = 1  # number of runs trained at once, if several are named
    wait: bool = False  # if another process trains this run, wait for it instead of stopping
    dry_run: bool = False  # train nothing; print what the runs would cost
    gpu: str = "h100"  # GPU that a dry run assumes: h100, h200, a100, rtx4090; cpu: no hours
    # share of the GPU's peak speed, as its data sheet gives it, that a dry run assumes
    utilisation: Utilisation = 0.4


DEFAULT_RECIPE = "scenes-gear"  # whose values `gear train --help` shows

USAGE = Usage(
    names="RECIPE [RECIPE ...]",
    options=lambda names: TrainOptions(recipe(names[0] if names else DEFAULT_RECIPE)),
    examples=(
        "gear train scenes-gear-s0",
        "gear train scenes-gear --tau 0.05 --label sharp",
        "gear train scenes-gear-s0 scenes-gear-s1 --jobs 2",
        "gear train imagenet256-l-gear-s0 --dry-run",
    ),
    details=(
        "RECIPE is PRESET-METHOD, or PRESET-METHOD-sN for the seed N, which --seed N sets too.\n"
        f"Presets: {', '.join(PRESETS)}.\nMethods: {', '.join(METHODS)}.\nOther recipes: "
        f"{', '.join(str(name) for name in CONFIGS if not name.method)}.\n"
        "Several recipes are trained as they are: changes and --label apply to a single one. The "
        f"defaults below are those of the named recipe, without a name those of {DEFAULT_RECIPE}."
    ),
    title="What to train",
    choices=tuple(name + seed for name in RECIPES for seed in ("", "-s0")),
)


def command(names, arguments):
    if not names:
        raise UserError(f"name a recipe: gear train RECIPE. Known: {known()}.")
    base = recipe(names[0])
    options = parse(TrainOptions(base), arguments, "train")
    if options.config.seed != base.seed:  # the seed is part of the name
        if seeded := [name for name in names if name not in RECIPES]:
            raise UserError(
                f"--seed {options.config.seed}: '{seeded[0]}' names a seed already. Give one of "
                "the two."
            )
        return command([with_parts(name, seed=options.config.seed) for name in names], arguments)
    if len(names) > 1:
        if options.config != base:
            raise UserError("changes apply to one run: name a single recipe.")
        if options.name or options.label:
            raise UserError("--name and --label name one run: name a single recipe.")
        if options.dry_run:
            # a dict, since several runs may share a parent
            planned = {
                run: config for name in names for run, config in plan(recipe(name), name, dry=True)
            }
            return dry_run(
                planned.items(), options.gpu, options.utilisation, options.runtime.accumulate
            )
        return train_many(names, options.jobs, options.runtime)
    name = options.name or with_parts(names[0], cell=options.label)
    with given_by("--name" if options.name else "--label"):
        run_path(name)
    _check_parent(options.config, base)
    if options.config.teacher != base.teacher and not options.dry_run:
        with given_by("--teacher"):
            check_teachers([options.config])
    planned = plan(
        options.config, name, base, options.label, options.dry_run, options.share_warm_up
    )
    if options.dry_run:
        return dry_run(planned, options.gpu, options.utilisation, options.runtime.accumulate)
    run = train_with_parents(planned, options.runtime, options.wait)
    print(f"{run.name}: step {run.step}, {run.path}")


def _check_parent(config, base):
    """Raise UserError unless the parent that --tokenizer-run names is a recipe or an existing run.

    A file is checked by `plan`, which opens it.
    """
    parent = config.tokenizer_run
    if parent and parent != base.tokenizer_run and not is_file(parent):
        with given_by("--tokenizer-run"):
            try:
                recipe(config.tokenizer_run)
            except UserError:
                Run.open(config.tokenizer_run)
