"""The presets. A preset is the configuration that all methods of a family share; some presets also
have changes for single stages.

The text below each preset says what it is, its command, its cost and the expected result.
gear/experiments/recipes.py derives the runs.
"""

from dataclasses import replace

from gear.data import DataConfig
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.training.settings import Config, ObjectiveConfig, OptimizerConfig


def change(config, changes):
    """Return a copy of `config` with nested `changes`: {"steps": 3, "optimizer": {"clip": 2.0}}.

    A dict changes the fields of a section; any other value replaces a field.
    """
    values = {
        name: change(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(config, **values)


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
"""Procedural scenes of 32 px with 8 x 8 tokens and K = 512, for two CPU cores.

Command: gear train scenes-gear-s0
Cost: about 5 CPU-minutes, parents included.
Expected result, compared with the baseline scenes-llamagen-repa-s0: the joint generator is closer
to the teacher per patch, at about the same PSNR; next-token losses differ by less than their spread
over seeds.
"""

SCENES_SETTLED = change(
    SCENES,
    dict(
        steps=2400,
        batch_size=16,
        log_every=20,
        eval_every=240,
        save_every=600,
        optimizer=dict(decay_from=0.3, decay_to=0.02, tokenizer_ema=0.99, generator_ema=0.99),
    ),
)
"""The scenes preset with a schedule at whose end losses stand still: the reference of the results.

Command: gear train scenes-settled-gear-s0 --cached
Cost: about an hour on one CPU core for the eight headline methods of one seed, parents included
(an estimate from the time per step; scores take half an hour more).
Expected result: the next-token loss on validation images moves by less than 0.02 nats over the last
tenth of the steps.

Batches of 16 learn more per image than those of 32. The generator's rate of 3e-3 was chosen on seed
9, which is no reference seed.
"""

SCENES_IBQ = change(SCENES, dict(tokenizer=dict(quantizer="ibq")))
"""The scenes preset with an IBQ tokenizer.

Command: gear train scenes-ibq-gear-s0
"""

SCENES_LFQ = change(
    SCENES,
    dict(tokenizer=dict(quantizer="lfq", backbone="magvit2", code_dim=9), objective=dict(tau=0.25)),
)
"""The scenes preset with an LFQ tokenizer of nine bits, on Open-MAGVIT2's backbone.

Command: gear train scenes-lfq-gear-s0

The affinity A of each quantizer has its own scale. tau is chosen so that the soft assignment of the
warm-up has an entropy of about half a nat, as in `SCENES`.
"""

CIFAR10_SMOKE = change(
    SCENES,
    dict(
        teacher="efficientnet-lite0",
        eval_every=50,
        data=dict(source="cifar10"),
        generator=dict(num_classes=10),
        # A fixed adversarial weight leaves a 4-pixel grid in the images; the entropy term costs
        # 0.5 dB of PSNR.
        objective=dict(gan_weight=0.0, entropy_weight=0.0),
    ),
)
"""CIFAR-10 at 32 px, with an ImageNet teacher and without an adversarial term: a check on
photographs that everything works, small enough for a CPU.

Command: gear train cifar10-smoke-gear-s0 (torchvision downloads CIFAR-10), or, from a zip or folder
with one sub-folder per class: gear train cifar10-smoke-gear-s0 --source cifar10.zip --label zip
Cost: about 8 CPU-minutes, parents included.
Expected result: PSNR 22.0 dB (21.4 dB at the linear initialisation; patch borders are visible),
next-token loss 3.8 nats per token at a usage entropy of 6.1 nats, alignment loss -0.32.
"""

CIFAR10 = change(CIFAR10_SMOKE, dict(
    batch_size=256, log_every=10,
    tokenizer=dict(codebook_size=1024, channels=32, res_blocks=2, latent_channels=64),
    generator=dict(width=384, layers=9, heads=6, tap_layer=3, projector_dim=768, dropout=0.1),
    optimizer=dict(generator_lr=1e-3, tokenizer_ema=0.99, generator_ema=0.99),
))  # fmt: skip
"""CIFAR-10 on one GPU: 8 x 8 tokens, K = 1,024, a generator of 17 M parameters.

Command: gear train cifar10-gear-s0 --workers 8
Cost: under 3 minutes on one data-centre GPU, parents included (an estimate, not measured).
Expected result: this preset has not been trained yet. Expect better values than those of
cifar10-smoke, and the same differences from the baseline cifar10-llamagen-repa-s0 as for scenes.
"""

CIFAR10_IBQ = change(CIFAR10, dict(tokenizer=dict(quantizer="ibq")))
"""The cifar10 preset with an IBQ tokenizer: gear train cifar10-ibq-gear-s0."""

CIFAR10_LFQ = change(
    CIFAR10,
    dict(
        tokenizer=dict(quantizer="lfq", backbone="magvit2", code_dim=10), objective=dict(tau=0.25)
    ),
)
"""The cifar10 preset with an LFQ tokenizer of ten bits: gear train cifar10-lfq-gear-s0."""

TINY = change(SCENES, dict(
    steps=24, batch_size=16, eval_every=8, save_every=6, eval_images=96,
    data=dict(train_images=512, val_images=128),
    tokenizer=dict(codebook_size=64, channels=8),
    generator=dict(width=32, heads=2, layers=3, tap_layer=1, projector_dim=64),
    # The adversarial term starts late, so that a resumed run can meet an optimizer without a step.
    objective=dict(gan_start=0.5),
))  # fmt: skip
"""The scenes preset at the size of a test: it runs every part in seconds and learns nothing."""

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
"""The setting of the paper's ablations (Tables 15 and 16): ImageNet at 256 px, 16 x 16 tokens,
K = 16,384, LlamaGen-L aligned at block 8.

Command: gear train imagenet256-l-gear-s0 --source PATH, where PATH is a folder or zip with one
sub-folder per class (default ./imagenet)
Cost: printed by --dry-run.
Expected result: the paper's. This preset has not been trained here.

Objective and optimizer follow Table 16; tests/experiments/test_recipes_published.py compares every
line. As in the public code, the condition has no rotation and the discriminator has BatchNorm.

The paper starts from a public tokenizer that it trains briefly:

gear train imagenet256-l-tokenizer-s0 --tokenizer-run vq_ds16_c2i.pt --steps 20000 --label public
gear train imagenet256-l-joint-s0 --tokenizer-run imagenet256-l-tokenizer-s0-public --label public

Differences from the paper: without --tokenizer-run, the warm-up trains from random weights for
400,000 steps; without --val-source, one image in twenty is held out for validation. Differences
from the public code: the perceptual weight is the paper's 0.1 (there 1), the first step has the
full learning rate (there 0), and A, entropies and read-outs are float32 (there bf16).
"""

IMAGENET256_B = change(
    IMAGENET256_L, dict(generator=replace(GENERATORS["B"], condition_rotation="zero"))
)
"""The imagenet256-l preset with LlamaGen-B, aligned at block 4 (Table 9).

Its warm-up equals that of imagenet256-l, so one trained warm-up can serve both by --tokenizer-run.
"""

IMAGENET256_XL = change(
    IMAGENET256_L, dict(generator=replace(GENERATORS["XL"], condition_rotation="zero"))
)
"""The imagenet256-l preset with LlamaGen-XL, aligned at block 12 (Table 9)."""

IMAGENET256_L_LFQ = replace(IMAGENET256_L, tokenizer=TOKENIZERS["LFQ-16"])
"""The imagenet256-l preset with Open-MAGVIT2's LFQ-16 of fourteen bits (Table 8)."""

IMAGENET256_L_IBQ = replace(IMAGENET256_L, tokenizer=TOKENIZERS["IBQ-16"])
"""The imagenet256-l preset with IBQ-16, whose codes have 256 dimensions (Table 8)."""

IMAGENET100_128 = change(
    IMAGENET256_L,
    dict(
        steps=100_000,
        batch_size=128,
        data=dict(source="imagenet100", image_size=128),
        generator=replace(IMAGENET256_B.generator, num_classes=100),
    ),
)
"""A hundred classes of ImageNet at 128 px, 8 x 8 tokens of the tokenizer VQ-16, LlamaGen-B.

Command: gear train imagenet100-128-gear-s0 --source PATH --workers 8
Cost, parents included: about 8 hours on an H100 or 25 hours on an A100 at 40 % of the data sheet's
FLOP/s, twice as long at 20 % (an estimate, which --dry-run prints).
Expected result: this preset has not been trained. Expect the directions of the paper's results, but
not their sizes: it has a tenth of the images and a quarter of the tokens.
"""

# Changes to a preset by stage. The entry `generator` also applies to the joint stage. GEAR's
# generator and the baseline's therefore train for as many steps at the same learning rates.
SCENES_STAGES = dict(
    tokenizer=dict(
        steps=600,
        eval_every=100,
        objective=dict(gan_start=0.6),
        optimizer=dict(tokenizer_lr=2e-3, decay_from=0.6),
    ),
)
SCENES_SETTLED_STAGES = dict(
    tokenizer=dict(
        steps=1200,
        eval_every=240,
        save_every=300,
        objective=dict(gan_start=0.6),
        optimizer=dict(tokenizer_lr=2e-3, decay_to=0.05),
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
IMAGENET256_SHORT = dict(generator=dict(steps=100_000))  # the schedule of Tables 10, 11 and 13
