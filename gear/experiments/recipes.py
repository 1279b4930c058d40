"""Named complete configurations, and training a run after its parents.

A recipe is one run with one stage. Methods derive from a base preset by changing what defines them.
The seed is part of a run's name: `scenes-gear-s1` is the recipe `scenes-gear` with seed 1, and so
are its parents.
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

VARIANTS = {
    "straight-through": dict(objective=dict(bridge="straight_through")),
    "naive-inputs": dict(objective=dict(bridge="naive_inputs")),
    "naive": dict(objective=dict(bridge="naive")),
    "no-gan": dict(objective=dict(gan_weight=0.0)),
    "no-align": dict(objective=dict(align_weight=0.0)),
    "no-init": dict(tokenizer_run=""),  # no warm-up (Table 12)
}


def _family(preset, base, warm_up="", tokenizer=None, generator=None):
    """Derive every method from `base`.

    `tokenizer` is what the warm-up changes of it, `generator` what every later stage does;
    `warm_up` is the preset whose warm-up is taken ("": its own). Returns {RunName: Config}. A name
    begins with the preset, the rest says what the run is:
      -tokenizer            the warm-up
      -control              the tokenizer trained on for as long as the joint stage, unguided (the
                            paper has none)
      -joint                tokenizer and generator together, by the soft bridge: GEAR
      -joint-VARIANT        the same by another bridge (Table 7) or without a part: see VARIANTS
      -llamagen             a fresh generator on the warm-up, no alignment
      -llamagen-repa        the same with alignment: the paper's baseline
      -llamagen-repa-control, -gear, -VARIANT   the same on the control, the GEAR and the variant's
        tokenizer
      -tokenizer-half, -llamagen-repa-half      a tokenizer with half the codes, trained as long as
        the control, and a generator on it: what NTP falls by for nothing
    """
    before, after = change(base, tokenizer or {}), change(base, generator or {})
    halved = dict(codebook_size=base.tokenizer.codebook_size // 2)
    if base.tokenizer.quantizer == "lfq":
        halved["code_dim"] = base.tokenizer.code_dim - 1  # one bit a dimension
    parent = lambda method, of=preset: str(RunName(of, method))  # noqa: E731
    warm_up = parent("tokenizer", warm_up or preset)
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
    **_family("tiny", TINY),
    RunName("tiny"): replace(TINY, stage="generator", tokenizer_run="tiny-joint"),
}
RECIPES = {str(name): replace(config, recipe=str(name)) for name, config in CONFIGS.items()}
NAMES = {str(name): name for name in CONFIGS}
PRESETS = tuple(dict.fromkeys(name.preset for name in CONFIGS if name.method))
METHODS = tuple(dict.fromkeys(name.method for name in CONFIGS if name.method))


DISCRIMINATOR = ("disc_channels", "disc_layers", "disc_norm")  # fields of the objective


def known():
    """Say which recipes there are: every preset has every method."""
    others = sorted(str(name) for name in CONFIGS if not name.method)
    return (
        f"PRESET-METHOD, presets {', '.join(PRESETS)}, methods {', '.join(METHODS)}; and "
        f"{', '.join(others)}"
    )


def run_name(text):
    """Read a run's name as a RunName, by the recipes there are."""
    return RunName.parse(text, NAMES)


def with_parts(text, **parts):
    """Return a run's name with other `parts` of its RunName: a seed, or a cell."""
    return str(replace(run_name(text), **parts))


def recipe(name):
    """Return the Config of the run `name`: a recipe's name, with `-sN` for seed N; its parents
    carry the same seed.
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
    """List (name, Config) of a run's ancestors and the run itself, in the order they must be
    trained.

    The number of classes is the source's; in a `dry` plan a folder that is not there has as many as
    the preset says.

    Where `config` changes its recipe in a section that an ancestor shares, that ancestor is another
    run too: it takes the change and `label` at the end of its name; with `share_warm_up` the
    warm-up keeps the preset's image size. An ancestor that is no recipe must exist. Paths of
    data become absolute, but for those of a `dry` plan, which may be nowhere.
    """
    planned = _plan(config, name or config.recipe, base, label, dry, share_warm_up, counted={})
    return (
        planned
        if dry
        else [(name, replace(config, data=absolute(config.data))) for name, config in planned]
    )


def _plan(config, name, base, label, dry, share_warm_up, counted):
    asked = config.generator.num_classes
    if config.data not in counted:  # a folder is walked once for a run and its ancestors
        with given_by("--source"):
            counted[config.data] = num_classes(config.data, asked if dry else None)
    classes = counted[config.data]
    if asked not in (classes, (base or config).generator.num_classes):
        raise UserError(
            f"num_classes is {asked}: the images have {classes} classes, and a run takes theirs. "
            "Leave it out."
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
            f"'{config.tokenizer_run}' trains no tokenizer: set tokenizer_run to a run of the "
            "stage tokenizer or joint."
        )
    shared = ["data", "tokenizer"] + (
        ["generator", "objective", "teacher"] if parent.trains("generator") else []
    )
    sections = {s: [getattr(c, s) for c in (base or recipe(name), config, parent)] for s in shared}
    parent = replace(parent, **{section: _carry(*three) for section, three in sections.items()})
    if not parent.trains("generator"):  # whose discriminator the joint stage goes on with
        sizes = {name: getattr(config.objective, name) for name in DISCRIMINATOR}
        parent = replace(parent, objective=replace(parent.objective, **sizes))
    parent_name = config.tokenizer_run
    if share_warm_up and original.stage == "tokenizer" and not original.tokenizer_run:
        size = original.data.image_size
        parent = replace(parent, data=replace(parent.data, image_size=size))
    if parent != original:
        if not label:
            raise UserError(
                "these changes also change the run's parents: give them a label, e.g. --label mine."
            )
        parent_name = with_parts(parent_name, cell=label)
    before = _plan(parent, parent_name, original, label, dry, share_warm_up, counted)
    return [
        *before,
        (name, replace(config, tokenizer_run=parent_name, tokenizer=before[-1][1].tokenizer)),
    ]


def _from_run(config, run):
    """Return a config whose tokenizer, and discriminator where it trains one, are those of a run
    that is no recipe.
    """
    config = replace(config, tokenizer=from_dict(TokenizerConfig, run.config["tokenizer"]))
    if not config.trains("discriminator"):
        return config
    sizes = {name: run.config["objective"].get(name) for name in DISCRIMINATOR}
    sizes = {name: value for name, value in sizes.items() if value is not None}  # older runs
    return replace(config, objective=replace(config.objective, **sizes))


def _from_file(config):
    """Return a config whose tokenizer, and discriminator if there is one, are those of the file
    that it starts from.
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
    """Return `target` with the fields in which `changed` differs from `base`, and only those."""
    if not dataclasses.is_dataclass(base):
        return changed if changed != base else target
    fields = [
        f.name
        for f in dataclasses.fields(base)
        if getattr(base, f.name) != getattr(changed, f.name)
    ]
    return replace(target, **{name: getattr(changed, name) for name in fields})


def train_with_parents(planned, runtime=Runtime(), wait=False):
    """Train what is missing of a run's ancestors, then the run, as `plan` lists them; returns it.
    `wait`: see `train`; for ancestors it is done.
    """
    check_teachers(c for _, c in planned)
    *ancestors, own = planned
    for n, c in ancestors:
        # several may start from one, on several machines
        train(c, n, in_parts(c, n, runtime), wait=True)
    return train(own[1], own[0], in_parts(own[1], own[0], runtime), wait)


def in_parts(config, name, runtime):
    """Return `runtime` with the number of parts for its `accumulate` "auto".

    It is as few as fit on the GPU, were it empty, for every process the same; for a run that is
    trained none is sought. Raises UserError where blocks are sharded: what they take is not
    counted.
    """
    if runtime.accumulate != "auto" or is_trained(Run(run_path(name)), config):
        return runtime
    require(
        not runtime.fsdp,
        "--accumulate auto counts a whole generator: with --fsdp, give a number.",
    )
    device, processes = find_device(runtime.device), world_size()
    if device.type == "cpu":
        return replace(runtime, accumulate=1)
    memory = torch.cuda.get_device_properties(device).total_memory
    is_compiled = way_of(config, device, runtime, is_alone=processes == 1) == "compiled"
    parts = parts_that_fit(config, config.batch_size // processes, memory, is_compiled)
    print(f"a batch of {config.batch_size} goes in {parts} parts", file=sys.stderr)
    return replace(runtime, accumulate=parts)


def check_teachers(configs):
    """Raise UserError if a teacher that one of `configs` needs is missing: before its parents
    train, not after.
    """
    aligned = {(c.teacher, c.data, c.tokenizer.downsampling) for c in configs if c.is_aligned}
    for names, images, stride in aligned:
        check_installed(names, images, stride)
