"""The recipes: a complete configuration for every run name. Training a run after its parents.

A recipe describes one run with one stage. Every method is derived from a preset by changing the
fields that define the method. The seed is part of a run's name: `scenes-gear-s1` is the recipe
`scenes-gear` with seed 1, and its parents have seed 1 too.
"""

import dataclasses
import os
import sys
from dataclasses import replace

import torch

from gear.checkpoints import is_file, open_checkpoint
from gear.config import UserError, from_dict, given_by, nearest, require
from gear.cost.price import parts_that_fit
from gear.data import DataConfig, absolute, num_classes
from gear.device import find_device
from gear.experiments.presets import (
    CIFAR10,
    CIFAR10_IBQ,
    CIFAR10_LFQ,
    CIFAR10_SMOKE,
    CIFAR10_SMOKE_STAGES,
    CIFAR10_STAGES,
    IMAGENET100_128,
    IMAGENET256_B,
    IMAGENET256_L,
    IMAGENET256_L_IBQ,
    IMAGENET256_L_LFQ,
    IMAGENET256_SHORT,
    IMAGENET256_XL,
    SCENES,
    SCENES_IBQ,
    SCENES_LFQ,
    SCENES_SETTLED,
    SCENES_SETTLED_STAGES,
    SCENES_STAGES,
    TINY,
    change,
)
from gear.runs.folder import run_path
from gear.runs.names import RunName
from gear.runs.run import Run
from gear.teachers import check_installed
from gear.tokenizer.config import TokenizerConfig
from gear.training.loop import Runtime, is_trained, train
from gear.training.processes import world_size
from gear.training.running import way_of
from gear.training.settings import Config, OptimizerConfig

VARIANTS = {  # changes to the joint stage
    "straight-through": dict(objective=dict(bridge="straight_through")),
    "naive-inputs": dict(objective=dict(bridge="naive_inputs")),
    "naive": dict(objective=dict(bridge="naive")),
    "no-gan": dict(objective=dict(gan_weight=0.0)),
    "no-align": dict(objective=dict(align_weight=0.0)),
    "no-init": dict(tokenizer_run=""),  # starts without a warm-up (Table 12)
}


def _family(preset, base, warm_up="", tokenizer=None, generator=None):
    """Derive every method from the configuration `base`; returns {RunName: Config}.

    `tokenizer` holds the changes to `base` for the warm-up, `generator` those for every later
    stage. `warm_up` names the preset whose warm-up is used; "" means `preset`. A run's name is the
    preset followed by the method:
      -tokenizer              the warm-up
      -control                the warm-up trained further for as many steps as the joint stage,
                              without guidance (not in the paper)
      -joint                  GEAR: tokenizer and generator trained together by the soft bridge
      -joint-VARIANT          the joint stage with another bridge (Table 7), or without one of its
                              parts; see VARIANTS
      -llamagen               a fresh generator on the warm-up, without alignment
      -llamagen-repa          the baseline: a fresh generator on the warm-up, with alignment
      -llamagen-repa-control  a fresh generator on the control, with alignment
      -gear                   a fresh generator on GEAR's tokenizer, with alignment
      -VARIANT                a fresh generator on the variant's tokenizer, with alignment
      -tokenizer-half         a tokenizer with half the codes, trained for as many steps as warm-up
                              and control together
      -llamagen-repa-half     a fresh generator on that one, with alignment: it shows how far the
                              next-token loss falls because of fewer codes alone
    """
    before = change(base, tokenizer or {})
    after = change(base, generator or {})
    halved = dict(codebook_size=base.tokenizer.codebook_size // 2)
    if base.tokenizer.quantizer == "lfq":
        halved["code_dim"] = base.tokenizer.code_dim - 1  # LFQ has one bit per dimension
    parent = lambda method: str(RunName(preset, method))  # noqa: E731
    warm_up = str(RunName(warm_up or preset, "tokenizer"))
    runs = {
        "tokenizer": replace(before, stage="tokenizer"),
        "control": replace(after, stage="tokenizer", tokenizer_run=warm_up),
        "joint": replace(after, stage="joint", tokenizer_run=warm_up),
        "llamagen-repa": replace(after, tokenizer_run=warm_up),
        "llamagen": change(after, dict(tokenizer_run=warm_up, objective=dict(align_weight=0.0))),
        "tokenizer-half": change(
            before,
            dict(stage="tokenizer", steps=before.steps + after.steps, tokenizer=halved),
        ),
        "llamagen-repa-half": change(
            after, dict(tokenizer=halved, tokenizer_run=parent("tokenizer-half"))
        ),
        "llamagen-repa-control": replace(after, tokenizer_run=parent("control")),
        "gear": replace(after, tokenizer_run=parent("joint")),
    }
    for variant, changes in VARIANTS.items():
        runs[f"joint-{variant}"] = change(runs["joint"], changes)
        runs[variant] = replace(after, tokenizer_run=parent(f"joint-{variant}"))
    return {RunName(preset, method): config for method, config in runs.items()}


CONFIGS = {
    **_family("scenes", SCENES, **SCENES_STAGES),
    **_family("scenes-settled", SCENES_SETTLED, **SCENES_SETTLED_STAGES),
    **_family("scenes-ibq", SCENES_IBQ, **SCENES_STAGES),
    **_family("scenes-lfq", SCENES_LFQ, **SCENES_STAGES),
    **_family("cifar10-smoke", CIFAR10_SMOKE, **CIFAR10_SMOKE_STAGES),
    **_family("cifar10", CIFAR10, **CIFAR10_STAGES),
    **_family("cifar10-ibq", CIFAR10_IBQ, **CIFAR10_STAGES),
    **_family("cifar10-lfq", CIFAR10_LFQ, **CIFAR10_STAGES),
    **_family("imagenet100-128", IMAGENET100_128),
    **_family("imagenet256-b", IMAGENET256_B),
    **_family("imagenet256-l", IMAGENET256_L),
    **_family("imagenet256-xl", IMAGENET256_XL),
    **_family("imagenet256-l-100k", IMAGENET256_L, warm_up="imagenet256-l", **IMAGENET256_SHORT),
    **_family("imagenet256-l-ibq", IMAGENET256_L_IBQ),
    **_family("imagenet256-l-lfq", IMAGENET256_L_LFQ),
    RunName("teacher-scenes"): Config(
        recipe="teacher-scenes",
        stage="teacher",
        steps=600,
        batch_size=128,
        log_every=10,
        eval_every=100,
        save_every=100,
        data=DataConfig("scenes", image_size=32, labels="factors"),
        optimizer=OptimizerConfig(generator_lr=3e-3, decay_from=0.5),
    ),
    RunName("detector-scenes"): Config(
        recipe="detector-scenes",
        stage="detector",
        steps=1000,
        batch_size=96,
        log_every=10,
        eval_every=100,
        save_every=100,
        eval_images=1000,
        data=DataConfig("scenes", image_size=32, train_images=96_000, labels="objects"),
        optimizer=OptimizerConfig(
            generator_lr=2e-3, warmup_steps=50, decay_from=0.3, decay_to=0.02
        ),
    ),
    **_family("tiny", TINY),
    RunName("tiny"): replace(TINY, stage="generator", tokenizer_run="tiny-joint"),
}
RECIPES = {str(name): replace(config, recipe=str(name)) for name, config in CONFIGS.items()}
NAMES = {str(name): name for name in CONFIGS}
PRESETS = tuple(dict.fromkeys(name.preset for name in CONFIGS if name.method))
METHODS = tuple(dict.fromkeys(name.method for name in CONFIGS if name.method))


DISCRIMINATOR = ("disc_channels", "disc_layers", "disc_norm")  # its fields in ObjectiveConfig


def known():
    """Return the names of all recipes in words. Every preset has every method."""
    single_recipes = sorted(str(name) for name in CONFIGS if not name.method)
    return (
        f"PRESET-METHOD, presets {', '.join(PRESETS)}, methods {', '.join(METHODS)}; and "
        f"{', '.join(single_recipes)}"
    )


def run_name(text):
    """Parse a run's name as a RunName, with the names of all recipes."""
    return RunName.parse(text, NAMES)


def with_parts(text, **parts):
    """Return a run's name with `parts` of its RunName replaced, e.g. the seed or the cell."""
    return str(replace(run_name(text), **parts))


def recipe(name):
    """Return the Config of the run `name`, which is a recipe's name, with `-sN` for seed N.

    The parents that the Config names have the same seed. Raises UserError for an unknown recipe.
    """
    parts = run_name(name)
    stem = name if parts.cell else parts.recipe
    if stem not in RECIPES:
        raise UserError(f"unknown recipe '{stem}'.{nearest(stem, RECIPES)} Known: {known()}.")
    config = RECIPES[stem]
    if parts.seed is None:
        return config
    parent = config.tokenizer_run and with_parts(config.tokenizer_run, seed=parts.seed)
    return replace(config, seed=parts.seed, tokenizer_run=parent)


def plan(config, name=None, base=None, label=None, dry=False, share_warm_up=False):
    """List (name, Config) of a run's ancestors and of the run itself, in the order of training.

    `base` is the recipe that `config` changes (default: the recipe `name`). If a change concerns a
    section that an ancestor shares, the ancestor becomes another run: it takes the change, and its
    name ends in `label`. With `share_warm_up`, the warm-up keeps the preset's image size. A parent
    that is neither a recipe nor a file must exist as a run.

    The number of classes is that of the data source. In a `dry` plan the source may be missing;
    the number is then the preset's. Paths of data become absolute, except in a `dry` plan.

    Raises UserError if the parents change and there is no `label`, if a parent trains no tokenizer,
    or if `config` asks for a number of classes that the source does not have.
    """
    planned = _plan(config, name or config.recipe, base, label, dry, share_warm_up, counted={})
    return (
        planned
        if dry
        else [(name, replace(config, data=absolute(config.data))) for name, config in planned]
    )


def _plan(config, name, base, label, dry, share_warm_up, counted):
    """List what `plan` lists. `counted` caches the number of classes by DataConfig."""
    configured = config.generator.num_classes
    if config.data not in counted:  # a folder is walked once for a run and its ancestors
        with given_by("--source"):
            counted[config.data] = num_classes(config.data, configured if dry else None)
    classes = counted[config.data]
    if configured not in (classes, (base or config).generator.num_classes):
        raise UserError(
            f"num_classes is {configured}: the images have {classes} classes, and a run uses the "
            "number of the images. Leave the option out."
        )
    config = replace(config, generator=replace(config.generator, num_classes=classes))
    if not config.tokenizer_run:
        return [(name, config)]
    if is_file(config.tokenizer_run):
        return [(name, _from_file(config))]
    try:
        parent = original = recipe(config.tokenizer_run)
    except UserError:
        return [(name, _from_run(config, Run.open(config.tokenizer_run)))]
    if not parent.trains("tokenizer"):
        raise UserError(
            f"'{config.tokenizer_run}' trains no tokenizer: set tokenizer_run to a run with the "
            "stage tokenizer or joint."
        )
    shared = ["data", "tokenizer"] + (
        ["generator", "objective", "teacher"] if parent.trains("generator") else []
    )
    configs = (base or recipe(name), config, parent)
    sections = {
        section: _carry(*(getattr(one_config, section) for one_config in configs))
        for section in shared
    }
    parent = replace(parent, **sections)
    # The joint stage continues training the warm-up's discriminator: their sizes have to agree.
    if not parent.trains("generator"):
        sizes = {field: getattr(config.objective, field) for field in DISCRIMINATOR}
        parent = replace(parent, objective=replace(parent.objective, **sizes))
    parent_name = config.tokenizer_run
    if share_warm_up and original.stage == "tokenizer" and not original.tokenizer_run:
        size = original.data.image_size
        parent = replace(parent, data=replace(parent.data, image_size=size))
    if parent != original:
        if not label:
            raise UserError(
                "these changes also concern the run's parents, which become new runs: give them a "
                "label, e.g. --label mine."
            )
        parent_name = with_parts(parent_name, cell=label)
    ancestors = _plan(parent, parent_name, original, label, dry, share_warm_up, counted)
    tokenizer = ancestors[-1][1].tokenizer
    return [*ancestors, (name, replace(config, tokenizer_run=parent_name, tokenizer=tokenizer))]


def _from_run(config, run):
    """Return `config` with the tokenizer of `run`, which is no recipe, and with the discriminator's
    sizes if the stage trains a discriminator.
    """
    config = replace(config, tokenizer=from_dict(TokenizerConfig, run.config["tokenizer"]))
    if not config.trains("discriminator"):
        return config
    sizes = {name: run.config["objective"].get(name) for name in DISCRIMINATOR}
    # older runs lack some of these fields
    sizes = {name: value for name, value in sizes.items() if value is not None}
    return replace(config, objective=replace(config.objective, **sizes))


def _from_file(config):
    """Return `config` with the tokenizer of the file `tokenizer_run`, and with the sizes of the
    file's discriminator if the stage trains one and the file has one.
    """
    path = os.path.abspath(os.path.expanduser(config.tokenizer_run))
    with given_by("--tokenizer-run"):
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.part("tokenizer")[1].size
        config = replace(config, tokenizer_run=path, tokenizer=tokenizer)
        if config.trains("discriminator") and "discriminator" in checkpoint.parts:
            channels, layers = checkpoint.part("discriminator")[1].size
            sizes = dict(zip(DISCRIMINATOR, (channels, layers, "batch")))
            config = replace(config, objective=replace(config.objective, **sizes))
    return config


def _carry(base, changed, target):
    """Return `target` with the changes from `base` to `changed`; its other fields stay."""
    if not dataclasses.is_dataclass(base):
        return changed if changed != base else target
    fields = [
        f.name
        for f in dataclasses.fields(base)
        if getattr(base, f.name) != getattr(changed, f.name)
    ]
    return replace(target, **{name: getattr(changed, name) for name in fields})


def train_with_parents(planned, runtime=Runtime(), wait=False):
    """Train the missing ancestors of a run, then the run, as listed by `plan`; returns the Run.

    `wait`: see `train`. An ancestor that another process trains is always waited for.
    """
    check_teachers(config for _, config in planned)
    *ancestors, (name, config) = planned
    for ancestor_name, ancestor in ancestors:
        # Several runs, on several machines, may need this ancestor at once: one trains it.
        train(ancestor, ancestor_name, in_parts(ancestor, ancestor_name, runtime), wait=True)
    return train(config, name, in_parts(config, name, runtime), wait)


def in_parts(config, name, runtime):
    """Return `runtime` with a number of micro-batches in place of `accumulate` "auto".

    It is the smallest number with which a step fits on the GPU if nothing else uses the GPU, and
    the same in every process. A run that is trained already, or an `accumulate` that is a number,
    changes nothing. Raises UserError with --fsdp, because the memory of sharded blocks is not
    estimated.
    """
    if runtime.accumulate != "auto" or is_trained(Run(run_path(name)), config):
        return runtime
    require(
        not runtime.fsdp,
        "--accumulate auto counts a whole generator: with --fsdp, give a number.",
    )
    device = find_device(runtime.device)
    num_processes = world_size()
    if device.type == "cpu":
        return replace(runtime, accumulate=1)
    memory = torch.cuda.get_device_properties(device).total_memory
    is_compiled = way_of(config, device, runtime, is_alone=num_processes == 1) == "compiled"
    num_parts = parts_that_fit(config, config.batch_size // num_processes, memory, is_compiled)
    print(
        f"a batch of {config.batch_size} is computed in {num_parts} micro-batches", file=sys.stderr
    )
    return replace(runtime, accumulate=num_parts)


def check_teachers(configs):
    """Raise UserError if a teacher that one of `configs` needs is not installed.

    Called before the parents train, so that the error does not come hours later.
    """
    teachers = {(c.teacher, c.data, c.tokenizer.downsampling) for c in configs if c.is_aligned}
    for names, data, stride in teachers:
        check_installed(names, data, stride)
