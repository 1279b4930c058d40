"""Named complete configurations, and training a run after its parents.

A recipe is one run with one stage. Methods derive from a base preset by changing what defines them.
The seed is part of a run's name: `scenes-gear-s1` is the recipe `scenes-gear` with seed 1, and so
are its parents.
"""

import dataclasses
import sys
from dataclasses import replace

import torch

from gear.config import UserError, from_dict, given_by, nearest, require
from gear.cost.price import parts_that_fit
from gear.data import DataConfig, absolute, num_classes
from gear.device import find_device
from gear.experiments.presets import (
    CIFAR10,
    CIFAR10_IBQ,
    CIFAR10_LFQ,
    CIFAR10_SMOKE,
    CIFAR10_STAGES,
    IMAGENET100_128,
    IMAGENET256_B,
    IMAGENET256_L,
    IMAGENET256_L_IBQ,
    IMAGENET256_L_LFQ,
    IMAGENET256_SHORT,
    IMAGENET256_STAGES,
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


def _family(preset, base, warm_up="", **stages):
    """Derive every method from `base`; `stages` holds, per stage, what its runs change of it;
    `warm_up` is another preset's.

    Returns {RunName: Config}. A name begins with the preset, the rest says what the run is:
      -tokenizer            the warm-up
      -control              the tokenizer trained on for as long as the joint stage, unguided (the
                            paper has none)
      -joint                tokenizer and generator together, by the soft bridge: GEAR
      -joint-VARIANT        the same by another bridge (Table 7) or without a part: see VARIANTS
      -llamagen             a fresh generator on the warm-up, no alignment
      -llamagen-repa        the same with alignment: the paper's baseline
      -llamagen-repa-control, -gear, -VARIANT   the same on the control, the GEAR and the variant's
        tokenizer
      -tokenizer-half, -llamagen-repa-half      a warm-up with half the codes, and the same on it:
        what NTP falls by for nothing
    """
    tokenizer, joint, generator = (
        change(base, stages[s]) for s in ("tokenizer", "joint", "generator")
    )
    parent = lambda method, of=preset: str(RunName(of, method))
    warm_up = parent("tokenizer", warm_up or preset)
    runs = {
        "tokenizer": replace(tokenizer, stage="tokenizer"),
        "control": replace(joint, stage="tokenizer", tokenizer_run=warm_up),
        "joint": replace(joint, stage="joint", tokenizer_run=warm_up),
        "llamagen-repa": replace(generator, tokenizer_run=warm_up),
        "llamagen": change(
            generator, dict(tokenizer_run=warm_up, objective=dict(align_weight=0.0))
        ),
        "tokenizer-half": change(
            change(base, stages["tokenizer"]), stages["half"] | dict(stage="tokenizer")
        ),
        "llamagen-repa-half": change(
            generator,
            dict(tokenizer=stages["half"]["tokenizer"], tokenizer_run=parent("tokenizer-half")),
        ),
        "llamagen-repa-control": replace(generator, tokenizer_run=parent("control")),
        "gear": replace(generator, tokenizer_run=parent("joint")),
    }
    for variant, changes in VARIANTS.items():
        runs[f"joint-{variant}"] = change(runs["joint"], changes)
        runs[variant] = replace(generator, tokenizer_run=parent(f"joint-{variant}"))
    return {RunName(preset, method): config for method, config in runs.items()}


CONFIGS = {
    **_family("scenes", SCENES, **SCENES_STAGES),
    **_family("scenes-ibq", SCENES_IBQ, **SCENES_STAGES),
    **_family(
        "scenes-lfq",
        SCENES_LFQ,
        **SCENES_STAGES | dict(half=dict(steps=800, tokenizer=dict(codebook_size=256, code_dim=8))),
    ),
    **_family(
        "cifar10-smoke",
        CIFAR10_SMOKE,
        tokenizer=dict(
            steps=500, eval_every=100, optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6)
        ),
        joint=dict(steps=200, optimizer=dict(decay_from=0.5)),
        generator=dict(steps=300),
        half=dict(steps=700, tokenizer=dict(codebook_size=256)),
    ),
    **_family("cifar10", CIFAR10, **CIFAR10_STAGES),
    **_family("cifar10-ibq", CIFAR10_IBQ, **CIFAR10_STAGES),
    **_family(
        "cifar10-lfq",
        CIFAR10_LFQ,
        **CIFAR10_STAGES
        | dict(half=dict(steps=1750, tokenizer=dict(codebook_size=512, code_dim=9))),
    ),
    **_family(
        "imagenet100-128",
        IMAGENET100_128,
        tokenizer=dict(steps=100_000),
        joint=dict(steps=50_000),
        generator=dict(steps=100_000),
        half=dict(steps=150_000, tokenizer=dict(codebook_size=8192)),
    ),
    **_family("imagenet256-b", IMAGENET256_B, **IMAGENET256_STAGES),
    **_family("imagenet256-l", IMAGENET256_L, **IMAGENET256_STAGES),
    **_family("imagenet256-xl", IMAGENET256_XL, **IMAGENET256_STAGES),
    **_family("imagenet256-l-100k", IMAGENET256_L, warm_up="imagenet256-l", **IMAGENET256_SHORT),
    **_family("imagenet256-l-ibq", IMAGENET256_L_IBQ, **IMAGENET256_STAGES),
    **_family(
        "imagenet256-l-lfq",
        IMAGENET256_L_LFQ,
        **IMAGENET256_STAGES | dict(half=dict(tokenizer=dict(codebook_size=8192, code_dim=13))),
    ),
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
    **_family(
        "tiny",
        TINY,
        tokenizer={},
        joint={},
        generator={},
        half=dict(tokenizer=dict(codebook_size=32)),
    ),
    RunName("tiny"): replace(TINY, stage="generator", tokenizer_run="tiny-joint"),
}
RECIPES = {str(name): replace(config, recipe=str(name)) for name, config in CONFIGS.items()}
NAMES = {str(name): name for name in CONFIGS}
PRESETS = tuple(dict.fromkeys(name.preset for name in CONFIGS if name.method))
METHODS = tuple(dict.fromkeys(name.method for name in CONFIGS if name.method))


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


def plan(config, name=None, base=None, label=None, dry=False):
    """List (name, Config) of a run's ancestors and the run itself, in the order they must be
    trained.

    The number of classes is the source's; in a `dry` plan a folder that is not there has as many as
    the preset says.

    Where `config` changes its recipe in a section that an ancestor shares, that ancestor is another
    run too: it takes the change and `label` at the end of its name. An ancestor that is no recipe
    must exist. Paths of data become absolute, but for those of a `dry` plan, which may be nowhere.
    """
    planned = _plan(config, name or config.recipe, base, label, dry, counted={})
    return (
        planned
        if dry
        else [(name, replace(config, data=absolute(config.data))) for name, config in planned]
    )


def _plan(config, name, base, label, dry, counted):
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
    try:
        parent = original = recipe(config.tokenizer_run)
    except UserError:
        existing = Run.open(config.tokenizer_run)
        return [
            (
                name,
                replace(config, tokenizer=from_dict(TokenizerConfig, existing.config["tokenizer"])),
            )
        ]
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
        sizes = {name: getattr(config.objective, name) for name in ("disc_channels", "disc_layers")}
        parent = replace(parent, objective=replace(parent.objective, **sizes))
    parent_name = config.tokenizer_run
    if parent != original:
        if not label:
            raise UserError(
                "these changes also change the run's parents: give them a label, e.g. --label mine."
            )
        parent_name = with_parts(parent_name, cell=label)
    before = _plan(parent, parent_name, original, label, dry, counted)
    return [
        *before,
        (name, replace(config, tokenizer_run=parent_name, tokenizer=before[-1][1].tokenizer)),
    ]


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


def train_with_parents(config, name=None, base=None, label=None, runtime=Runtime(), wait=False):
    """Train what is missing of a run's ancestors, then the run; returns it. `wait`: see `train`;
    for ancestors it is done.
    """
    planned = plan(config, name, base, label)
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
        not runtime.shard,
        "--accumulate auto counts a whole generator: with --shard, give a number.",
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
