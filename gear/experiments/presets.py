"""The presets: the configuration that all methods of a family share, and what each of its stages
changes of it.

A preset's text gives its command, its cost and what to expect. gear/experiments/recipes.py derives
the runs.
"""

from dataclasses import replace

from gear.data import DataConfig
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.training.settings import Config, ObjectiveConfig, OptimizerConfig


def change(config, changes):
    """Return a config with nested `changes` ({"steps": 3, "optimizer": {"clip": 2.0}})."""
    nested = {
        k: change(getattr(config, k), v) if isinstance(v, dict) else v for k, v in changes.items()
    }
    return replace(config, **nested)


SCENES = Config(
    recipe="",
    stage="generator",
    steps=200,
    batch_size=32,
    log_every=1,
    eval_every=25,
    save_every=50,
    data=DataConfig("scenes", image_size=32),
    tokenizer=TokenizerConfig(
        codebook_size=512,
        code_dim=8,
        channels=8,
        channel_mult=(1, 2, 4),
        latent_channels=32,
        res_blocks=1,
        linear_skip=True,
        init_from_data=True,
    ),
    generator=GeneratorConfig(
        width=96,
        layers=6,
        heads=3,
        num_classes=24,
        tap_layer=2,
        projector_dim=192,
        dropout=0.0,
        embed_std=0.1,
    ),
    objective=ObjectiveConfig(
        lpips_weight=0.0, gan_weight=0.02, tau=0.02, disc_channels=16, disc_layers=2
    ),
    optimizer=OptimizerConfig(
        tokenizer_lr=5e-4, generator_lr=3e-3, tokenizer_ema=0.97, generator_ema=0.97
    ),
)
"""32 px procedural scenes, 8 x 8 tokens, K = 512: everything in minutes on two CPU cores.

gear train scenes-gear-s0     about 5 CPU-minutes with its parents. Expect, against
scenes-llamagen-repa-s0: a lower next-token loss and a better alignment of the fresh generator at
about the same PSNR.
"""

SCENES_IBQ = change(SCENES, dict(tokenizer=dict(quantizer="ibq")))
"""The scenes preset with an IBQ tokenizer: `gear train scenes-ibq-gear-s0`."""

SCENES_LFQ = change(
    SCENES,
    dict(tokenizer=dict(quantizer="lfq", backbone="magvit2", code_dim=9), objective=dict(tau=0.25)),
)
"""The scenes preset with an LFQ tokenizer, nine bits, on Open-MAGVIT2's backbone.

gear train scenes-lfq-gear-s0

Each tokenizer's A has its own scale: tau is where the warm-up's soft assignment has about half a
nat, as in `SCENES`.
"""

CIFAR10_SMOKE = change(
    SCENES,
    dict(
        teacher="efficientnet-lite0",
        eval_every=50,
        data=dict(source="cifar10"),
        generator=dict(num_classes=10),
        objective=dict(
            gan_weight=0.0, entropy_weight=0.0
        ),  # a fixed GAN weight prints a 4-pixel grid; entropy costs .5 dB
    ),
)
"""Photographs at the scenes' size, for a CPU: CIFAR-10, 32 px, an ImageNet teacher, no adversarial
term.

gear train cifar10-smoke-gear-s0, where torchvision can download CIFAR-10, or from a zip (or folder)
of class folders: gear train cifar10-smoke-gear-s0 --source cifar10.zip --label zip

About 8 CPU-minutes with its parents. Expect of cifar10-smoke-gear-s0: PSNR 22.0 dB (the linear
start has 21.4; patches show), 3.8 nats a token of a usage entropy of 6.1, alignment -0.32. It shows
that everything works, no more.
"""

CIFAR10 = change(CIFAR10_SMOKE, dict(
    batch_size=256, log_every=10,
    tokenizer=dict(codebook_size=1024, channels=32, res_blocks=2, latent_channels=64),
    generator=dict(width=384, layers=9, heads=6, tap_layer=3, projector_dim=768, dropout=0.1),
    optimizer=dict(generator_lr=1e-3, tokenizer_ema=0.99, generator_ema=0.99),
))  # fmt: skip
"""CIFAR-10 on one GPU: 8 x 8 tokens, K = 1,024, a generator of 17 M parameters.

gear train cifar10-gear-s0 --workers 8: under 3 minutes with its parents on one data-centre GPU: an
estimate, not measured. Nobody has trained it yet: expect more than of the smoke preset, and against
cifar10-llamagen-repa-s0 what the scenes show.
"""

CIFAR10_IBQ = change(CIFAR10, dict(tokenizer=dict(quantizer="ibq")))
"""The CIFAR-10 preset with an IBQ tokenizer."""

CIFAR10_LFQ = change(
    CIFAR10,
    dict(
        tokenizer=dict(quantizer="lfq", backbone="magvit2", code_dim=10), objective=dict(tau=0.25)
    ),
)
"""The CIFAR-10 preset with an LFQ tokenizer, ten bits."""

TINY = change(SCENES, dict(
    steps=24, batch_size=16, eval_every=8, save_every=6, eval_images=96,
    data=dict(train_images=512, val_images=128),
    tokenizer=dict(codebook_size=64, channels=8),
    generator=dict(width=32, heads=2, layers=3, tap_layer=1, projector_dim=64),
    objective=dict(gan_start=0.5),  # so that a resume meets an optimizer that has not stepped
))  # fmt: skip
"""The scenes preset at the size of a test: every part, nothing learnt."""

IMAGENET256_L = Config(
    recipe="",
    stage="generator",
    steps=400_000,
    batch_size=256,
    precision="bf16",
    teacher="dinov2-b",
    save_every=10_000,
    data=DataConfig("imagenet", image_size=256),
    tokenizer=TOKENIZERS["VQ-16"],
    generator=replace(GENERATORS["L"], condition_rotation="zero"),
    objective=ObjectiveConfig(disc_norm="batch"),
    optimizer=OptimizerConfig(),
)
"""The paper's ablations, Tables 15 and 16: ImageNet at 256 px, 16 x 16 tokens, K = 16,384,
LlamaGen-L aligned at block 8.

gear train imagenet256-l-gear-s0 --source PATH, a folder or zip of class folders; without it
./imagenet

Objective and optimizer are Table 16's; tests/experiments/test_recipes_published.py compares every
line. A condition has no rotation and the discriminator BatchNorm, as in the public code.

The paper's start, a public tokenizer, briefly trained on:

gear train imagenet256-l-tokenizer-s0 --tokenizer-run vq_ds16_c2i.pt --steps 20000 --label public
gear train imagenet256-l-joint-s0 --tokenizer-run imagenet256-l-tokenizer-s0-public --label public

Departures: without --tokenizer-run the warm-up trains from nothing, for 400,000 steps; without
--val-source one image in twenty is held out for validation; the perceptual weight is the paper's .1
(the public code has 1), the first step has the full rate (there 0), and A, entropies and read-outs
are float32 (there bf16). Nobody has trained it here; expect what the paper reports.
"""

IMAGENET256_B = change(
    IMAGENET256_L, dict(generator=replace(GENERATORS["B"], condition_rotation="zero"))
)
"""The same with LlamaGen-B, aligned at block 4 (Table 9). The warm-up is the L preset's:
--tokenizer-run shares it.
"""

IMAGENET256_XL = change(
    IMAGENET256_L, dict(generator=replace(GENERATORS["XL"], condition_rotation="zero"))
)
"""The same with LlamaGen-XL, aligned at block 12 (Table 9)."""

IMAGENET256_L_LFQ = replace(IMAGENET256_L, tokenizer=TOKENIZERS["LFQ-16"])
"""The L preset with Open-MAGVIT2's LFQ-16, fourteen bits (Table 8)."""

IMAGENET256_L_IBQ = replace(IMAGENET256_L, tokenizer=TOKENIZERS["IBQ-16"])
"""The L preset with IBQ-16, codes of 256 dimensions (Table 8)."""

IMAGENET100_128 = change(
    IMAGENET256_L,
    dict(
        steps=100_000,
        batch_size=128,
        data=dict(source="imagenet100", image_size=128),
        generator=replace(IMAGENET256_B.generator, num_classes=100),
    ),
)
"""A hundred classes of ImageNet at 128 px, 8 x 8 tokens of the same VQ-16, LlamaGen-B: about a day
on one GPU.

gear train imagenet100-128-gear-s0 --source PATH --workers 8

With its parents about 8 hours on an H100 and 25 on an A100, if each reaches 40 % of its data
sheet's FLOP/s, and twice that at 20 %: an estimate (`--dry-run` prints it), nobody has trained it.
Expect the direction of the paper's results, not their size: a tenth of the images, a quarter of the
tokens.
"""

# What stages change of a preset. The joint stage changes what `generator` does, so that GEAR's own
# generator and LlamaGen-REPA's train for as long at the same rates.
SCENES_STAGES = dict(
    tokenizer=dict(
        steps=600,
        eval_every=100,
        objective=dict(gan_start=0.6),
        optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6),
    ),
)
CIFAR10_SMOKE_STAGES = dict(
    tokenizer=dict(steps=500, eval_every=100, optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6)),
    generator=dict(steps=300),
)
CIFAR10_STAGES = dict(
    tokenizer=dict(
        steps=1500,
        eval_every=250,
        save_every=500,
        optimizer=dict(tokenizer_lr=1e-3, warmup_steps=50, decay_from=0.6),
    ),
    generator=dict(steps=400, optimizer=dict(warmup_steps=50)),
)
IMAGENET256_SHORT = dict(generator=dict(steps=100_000))  # Tables 10, 11 and 13
