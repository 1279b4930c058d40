"""gear train: runs by recipe name, with their parents."""

from dataclasses import dataclass, field

from gear.checkpoints import is_file
from gear.cli.arguments import parse
from gear.config import Checked, Jobs, UserError, given_by
from gear.cost.dry_run import dry_run
from gear.cost.price import Utilisation
from gear.experiments.jobs import train_many
from gear.experiments.recipes import (
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
    config: Config
    runtime: Runtime = field(default_factory=Runtime)
    name: str = ""  # the run's name, if not the recipe's
    label: str = ""  # ends the name of this run and of every parent that the changes concern
    share_warm_up: bool = False  # the warm-up keeps the preset's image size: one serves all sizes
    jobs: Jobs = 1  # runs trained at once, where several are named
    wait: bool = False  # for the end of another process that trains this run; else that is an error
    dry_run: bool = False  # print what it would cost, and train nothing
    gpu: str = "h100"  # of a dry run: h100, h200, a100, rtx4090, or cpu
    # of a dry run: the share of the GPU's data sheet that is assumed
    utilisation: Utilisation = 0.4


def command(names, arguments):
    if not names:
        raise UserError(f"name a recipe: gear train NAME. Known: {known()}.")
    base = recipe(names[0])
    options = parse(TrainOptions(base), arguments)
    if options.config.seed != base.seed:  # the seed is part of the name
        if named := [name for name in names if name not in RECIPES]:
            raise UserError(
                f"--seed {options.config.seed}: '{named[0]}' names a seed already. Give one of the "
                "two."
            )
        return command([with_parts(name, seed=options.config.seed) for name in names], arguments)
    if len(names) > 1:
        if options.config != base:
            raise UserError("changes apply to one run: name a single recipe.")
        if options.name or options.label:
            raise UserError("--name and --label name one run: name a single recipe.")
        if options.dry_run:
            # a shared parent once
            planned = {n: c for name in names for n, c in plan(recipe(name), name, dry=True)}
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
    """Raise UserError unless the parent that --tokenizer-run names is a recipe, or there; `plan`
    opens a file.
    """
    parent = config.tokenizer_run
    if parent and parent != base.tokenizer_run and not is_file(parent):
        with given_by("--tokenizer-run"):
            try:
                recipe(config.tokenizer_run)
            except UserError:
                Run.open(config.tokenizer_run)
