"""Named complete configurations, and training a run after its parents.

A recipe is one run with one stage. Methods derive from a base preset by changing what defines them. The seed is part of a
run's name: `scenes-gear-s1` is the recipe `scenes-gear` with seed 1, and so are its parents.
"""

import dataclasses
import re
from dataclasses import replace

from gear.config import UserError, from_dict, nearest
from gear.data import DataConfig, num_classes
from gear.generator.model import GeneratorConfig
from gear.run import Run
from gear.teachers import check_installed
from gear.tokenizer.autoencoder import TokenizerConfig
from gear.training.loop import Runtime, train
from gear.training.optim import OptimizerConfig
from gear.training.settings import Config, ObjectiveConfig

VARIANTS = {
    "straight-through": dict(objective=dict(bridge="straight_through")),
    "naive-inputs": dict(objective=dict(bridge="naive_inputs")),
    "naive": dict(objective=dict(bridge="naive")),
    "no-gan": dict(objective=dict(gan_weight=0.0)),
    "no-align": dict(objective=dict(align_weight=0.0)),
    "no-init": dict(tokenizer_run=""),  # no warm-up (Table 12)
}


def _family(prefix, base, **stages):
    """Derive every method from `base`; `stages` holds, per stage, what its runs change of it.

    A name begins with the preset, the rest says what the run is:
      -tokenizer            the warm-up
      -control              the tokenizer trained on for as long as the joint stage, unguided (the paper has none)
      -joint                tokenizer and generator together, by the soft bridge: GEAR
      -joint-VARIANT        the same by another bridge (Table 7) or without a part: see VARIANTS
      -llamagen             a fresh generator on the warm-up, no alignment
      -llamagen-repa        the same with alignment: the paper's baseline
      -llamagen-repa-control, -gear, -VARIANT   the same on the control, the GEAR and the variant's tokenizer
      -tokenizer-half, -llamagen-repa-half      a warm-up with half the codes, and the same on it: what NTP falls by for nothing
    """
    tokenizer, joint, generator = (_change(base, stages[s]) for s in ("tokenizer", "joint", "generator"))
    warm_up = f"{prefix}-tokenizer"
    runs = {
        "tokenizer": replace(tokenizer, stage="tokenizer"),
        "control": replace(joint, stage="tokenizer", tokenizer_run=warm_up),
        "joint": replace(joint, stage="joint", tokenizer_run=warm_up),
        "llamagen-repa": replace(generator, tokenizer_run=warm_up),
        "llamagen": _change(generator, dict(tokenizer_run=warm_up, objective=dict(align_weight=0.0))),
        "tokenizer-half": _change(_change(base, stages["tokenizer"]), stages["half"] | dict(stage="tokenizer")),
        "llamagen-repa-half": _change(
            generator, dict(tokenizer=stages["half"]["tokenizer"], tokenizer_run=f"{prefix}-tokenizer-half")
        ),
        "llamagen-repa-control": replace(generator, tokenizer_run=f"{prefix}-control"),
        "gear": replace(generator, tokenizer_run=f"{prefix}-joint"),
    }
    for name, changes in VARIANTS.items():
        runs[f"joint-{name}"] = _change(_change(runs["joint"], changes), stages.get(name, {}))
        runs[name] = replace(generator, tokenizer_run=f"{prefix}-joint-{name}")
    return {f"{prefix}-{name}": replace(config, recipe=f"{prefix}-{name}") for name, config in runs.items()}


def _change(config, changes):
    """Return a config with nested `changes` ({"steps": 3, "optimizer": {"clip": 2.0}})."""
    nested = {k: _change(getattr(config, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(config, **nested)


SCENES = Config(
    recipe="", stage="generator", steps=200, batch_size=32, log_every=1, eval_every=20, save_every=50,
    data=DataConfig("scenes", image_size=32),
    tokenizer=TokenizerConfig(
        codebook_size=512, code_dim=8, channels=8, channel_mult=(1, 2, 4), latent_channels=32, res_blocks=1,
        linear_skip=True, init_from_data=True,
    ),
    generator=GeneratorConfig(
        width=96, layers=4, heads=3, num_classes=24, tap_layer=2, projector_dim=192, dropout=0.0, embed_std=0.1,
    ),
    objective=ObjectiveConfig(lpips_weight=0.0, gan_weight=0.02, tau=0.02, disc_channels=16, disc_layers=2),
    optimizer=OptimizerConfig(tokenizer_lr=5e-4, generator_lr=3e-3, tokenizer_ema=0.97, generator_ema=0.97),
)  # fmt: skip
"""32 px procedural scenes, 8 x 8 tokens, K = 512: everything in minutes on two CPU cores.

gear train scenes-gear-s0     about 5 CPU-minutes with its parents. Expect, against scenes-llamagen-repa-s0: a lower
next-token loss and a better alignment of the fresh generator at about the same PSNR.
"""

SCENES_IBQ = _change(SCENES, dict(tokenizer=dict(quantizer="ibq")))
"""The scenes preset with an IBQ tokenizer: `gear train scenes-ibq-gear-s0`."""

SCENES_LFQ = _change(SCENES, dict(tokenizer=dict(quantizer="lfq", backbone="magvit2", code_dim=9), objective=dict(tau=0.25)))
"""The scenes preset with an LFQ tokenizer, nine bits, on Open-MAGVIT2's backbone: `gear train scenes-lfq-gear-s0`.

Each tokenizer's A has its own scale: tau is where the warm-up's soft assignment has about half a nat, as in `SCENES`.
"""

CIFAR10_SMOKE = _change(SCENES, dict(
    teacher="efficientnet-lite0", eval_every=50, data=dict(source="cifar10"), generator=dict(num_classes=10),
    objective=dict(gan_weight=0.0, entropy_weight=0.0),  # a fixed GAN weight prints a 4-pixel grid; entropy costs .5 dB
))  # fmt: skip
"""Photographs at the scenes' size, for a CPU: CIFAR-10, 32 px, an ImageNet teacher, no adversarial term.

gear train cifar10-smoke-gear-s0                                      where torchvision can download CIFAR-10, or
gear train cifar10-smoke-gear-s0 --source cifar10.zip --label zip     from a zip (or folder) of class folders

About 8 CPU-minutes with its parents. Expect of cifar10-smoke-gear-s0: PSNR 22.0 dB (the linear start has 21.4; patches
show), 3.8 nats a token of a usage entropy of 6.1, alignment -0.32. It shows that everything works, no more.
"""

CIFAR10 = _change(CIFAR10_SMOKE, dict(
    batch_size=256, log_every=10,
    tokenizer=dict(codebook_size=1024, channels=32, res_blocks=2, latent_channels=64),
    generator=dict(width=384, layers=8, heads=6, tap_layer=3, projector_dim=768, dropout=0.1),
    optimizer=dict(generator_lr=1e-3, tokenizer_ema=0.99, generator_ema=0.99),
))  # fmt: skip
"""CIFAR-10 on one GPU: 8 x 8 tokens, K = 1,024, a generator of 15 M parameters.

gear train cifar10-gear-s0 --workers 8     under 3 minutes with its parents on one data-centre GPU: an estimate, not measured.
Nobody has trained it yet: expect more than of the smoke preset, and against cifar10-llamagen-repa-s0 what the scenes show.
"""

TINY = _change(SCENES, dict(
    steps=24, batch_size=16, eval_every=8, save_every=6, eval_images=96,
    data=dict(train_images=512, val_images=128),
    tokenizer=dict(codebook_size=64, channels=8),
    generator=dict(width=32, heads=2, layers=3, tap_layer=1, projector_dim=64),
    objective=dict(gan_start=0.5),  # so that a resume meets an optimizer that has not stepped
))  # fmt: skip
"""The scenes preset at the size of a test: every part, nothing learnt."""

BRIDGE = dict(steps=100, optimizer=dict(decay_from=1.0))  # GEAR's first half: enough to collapse, equal to it step by step

SCENES_STAGES = dict(
    tokenizer=dict(
        steps=600, eval_every=100, objective=dict(gan_start=0.6), optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6)
    ),
    joint=dict(steps=200, optimizer=dict(decay_from=0.5)),
    generator=dict(steps=200, eval_every=40),
    half=dict(steps=800, tokenizer=dict(codebook_size=256)),  # longer: at the reconstruction of the others
    **dict.fromkeys(["naive", "naive-inputs", "straight-through", "no-gan"], BRIDGE),
)  # fmt: skip

RECIPES = {
    **_family("scenes", SCENES, **SCENES_STAGES),
    **_family("scenes-ibq", SCENES_IBQ, **SCENES_STAGES),
    **_family(
        "scenes-lfq", SCENES_LFQ,
        **SCENES_STAGES | dict(half=dict(steps=800, tokenizer=dict(codebook_size=256, code_dim=8))),
    ),
    **_family(
        "cifar10-smoke", CIFAR10_SMOKE,
        tokenizer=dict(steps=500, eval_every=100, optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6)),
        joint=dict(steps=200, optimizer=dict(decay_from=0.5)),
        generator=dict(steps=300),
        half=dict(steps=700, tokenizer=dict(codebook_size=256)),
    ),
    **_family(
        "cifar10", CIFAR10,
        tokenizer=dict(
            steps=1500, eval_every=250, save_every=500, optimizer=dict(tokenizer_lr=1e-3, warmup_steps=50, decay_from=0.6)
        ),
        joint=dict(steps=250, optimizer=dict(decay_from=0.5)),
        generator=dict(steps=400, optimizer=dict(warmup_steps=50)),
        half=dict(steps=1750, tokenizer=dict(codebook_size=512)),
    ),
    "teacher-scenes": Config(
        recipe="teacher-scenes", stage="teacher", steps=600, batch_size=128, log_every=10, eval_every=100, save_every=100,
        data=DataConfig("scenes", image_size=32, labels="factors"),
        optimizer=OptimizerConfig(generator_lr=3e-3, decay_from=0.5),
    ),
    "tiny-tokenizer": replace(TINY, recipe="tiny-tokenizer", stage="tokenizer"),
    "tiny-joint": replace(TINY, recipe="tiny-joint", stage="joint", tokenizer_run="tiny-tokenizer"),
    "tiny": replace(TINY, recipe="tiny", stage="generator", tokenizer_run="tiny-joint"),
}  # fmt: skip


def known():
    """Say which recipes there are: every preset has every method."""
    presets = [name.removesuffix("-gear") for name in RECIPES if name.endswith("-gear")]
    methods = [name.removeprefix("scenes-") for name in _family("scenes", SCENES, **SCENES_STAGES)]
    others = RECIPES.keys() - {f"{preset}-{method}" for preset in presets for method in methods}
    return f"PRESET-METHOD, presets {', '.join(presets)}, methods {', '.join(methods)}; and {', '.join(sorted(others))}"


def recipe(name):
    """Return the Config of the run `name`: a recipe's name, with `-sN` for seed N; its parents carry the same seed."""
    stem, seed = re.fullmatch(r"(.*?)(?:-s(\d+))?", name).groups()
    if stem not in RECIPES:
        raise UserError(f"unknown recipe '{stem}'.{nearest(stem, RECIPES)} Known: {known()}.")
    config = RECIPES[stem]
    if seed is None:
        return config
    parent = config.tokenizer_run and f"{config.tokenizer_run}-s{seed}"
    return replace(config, seed=int(seed), tokenizer_run=parent)


SHARED = {  # the sections in which a changed run's parents change with it
    "tokenizer": ("data", "tokenizer"),
    "joint": ("data", "tokenizer", "generator", "objective", "teacher"),
}


def plan(config, name=None, base=None, label=None):
    """List (name, Config) of a run's ancestors and the run itself, in the order they must be trained.

    Where `config` changes its recipe in a section that an ancestor shares, that ancestor is another run too: it takes the
    change and `label` at the end of its name. An ancestor that is no recipe must exist.
    """
    name = name or config.recipe
    config = replace(config, generator=replace(config.generator, num_classes=num_classes(config.data)))
    if not config.tokenizer_run:
        return [(name, config)]
    try:
        parent = original = recipe(config.tokenizer_run)
    except UserError:
        existing = Run.open(config.tokenizer_run)
        return [(name, replace(config, tokenizer=from_dict(TokenizerConfig, existing.config["tokenizer"])))]
    if parent.stage not in SHARED:
        raise UserError(
            f"'{config.tokenizer_run}' trains no tokenizer: set tokenizer_run to a run of the stage tokenizer or joint."
        )
    for section in SHARED[parent.stage]:
        parent = replace(parent, **{section: _carry(getattr(base or recipe(name), section), getattr(config, section),
                                                    getattr(parent, section))})  # fmt: skip
    parent_name = config.tokenizer_run
    if parent != original:
        if not label:
            raise UserError("these changes also change the run's parents: give them a label, e.g. --label mine.")
        parent_name = f"{parent_name}-{label}"
    before = plan(parent, parent_name, original, label)
    return [*before, (name, replace(config, tokenizer_run=parent_name, tokenizer=before[-1][1].tokenizer))]


def _carry(base, changed, target):
    """Return `target` with the fields in which `changed` differs from `base`, and only those."""
    if not dataclasses.is_dataclass(base):
        return changed if changed != base else target
    fields = [f.name for f in dataclasses.fields(base) if getattr(base, f.name) != getattr(changed, f.name)]
    return replace(target, **{name: getattr(changed, name) for name in fields})


def train_with_parents(config, name=None, base=None, label=None, runtime=Runtime()):
    """Train what is missing of a run's ancestors, then the run; returns it."""
    planned = plan(config, name, base, label)
    check_teachers(c for _, c in planned)
    return [train(c, n, runtime) for n, c in planned][-1]


def check_teachers(configs):
    """Raise UserError if a teacher that one of `configs` needs is missing: before its parents train, not after."""
    aligned = [c for c in configs if c.stage in ("joint", "generator") and c.objective.align_weight > 0]
    for names, images, stride in {(c.teacher, c.data, c.tokenizer.downsampling) for c in aligned}:
        check_installed(names, images, stride)
