"""How fast a generator draws: tokens and images a second, beside what the memory's bandwidth
allows.

`python benchmarks/sampling.py [--quick] [--device cuda]` draws 16 x 16 tokens of LlamaGen's sizes
with random weights, in bfloat16 and once in float32, token by token from Python ("eager") and as
one CUDA graph ("graph"). The first batch, which pays for kernels, plans and the capture, is timed
apart from the best of the others.

The bound (`bound_images_s`): at every token all weights of the blocks and the head are read once,
and the filled part of the keys and values, half of it on average; `of_bound` is what is reached of
the images/s that the bandwidth, a measured copy's, allows for that. It prints a table and writes
benchmarks/sampling.csv; the decoder's images/s has a row of its own.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

import torch
from measure import card, copy_rate, seconds, write_table

from gear.device import open_device
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.generator.model import Generator
from gear.generator.sampling import generate
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.tokenizer.model import Tokenizer

OUT, CODES = Path(__file__).with_suffix(".csv"), 16_384
TINY = GeneratorConfig(width=32, heads=2, layers=3, tap_layer=1, num_classes=10)
SMALL = TokenizerConfig(
    codebook_size=CODES, channels=8, channel_mult=(1, 2, 2), latent_channels=16, res_blocks=1
)
CASES = {  # (mode, dtype, images, guidance): 1 is none, and else every image takes two rows
    "cuda": [
        ("graph", torch.bfloat16, 64, 1.0),
        ("graph", torch.bfloat16, 256, 1.0),
        ("graph", torch.bfloat16, 64, 1.5),
        ("eager", torch.bfloat16, 64, 1.0),
        ("graph", torch.float32, 64, 1.0),
    ],
    "cpu": [
        ("eager", torch.bfloat16, 4, 1.0),
        ("eager", torch.bfloat16, 4, 1.5),
        ("eager", torch.float32, 4, 1.0),
    ],
}
# a graph is captured in the second call, and replayed from then on
CALLS = {"graph": 4, "eager": 2}


def bytes_a_token(generator, rows, length, kind):
    """Return the bytes that drawing one token for each of `rows` sequences reads, on the mean of
    `length` tokens.

    The i-th is drawn with i keys and values, the condition's among them.
    """
    config, size = generator.config, kind.itemsize
    weights = sum(
        p.numel()
        for part in (generator.blocks, generator.norm, generator.head)
        for p in part.parameters()
    )
    cache = rows * config.layers * 2 * config.width * (length + 1) / 2
    return size * (weights + cache)


def drawing(size, generator, mode, kind, images, cfg_scale, options):
    """Return a row: `images` grids drawn a few times."""
    device, side = options.device, 4 if options.quick else 16
    labels = torch.arange(images) % generator.config.num_classes
    how = dict(cfg_scale=cfg_scale, dtype=kind, graph=mode == "graph")
    first, *others = seconds(
        lambda: generate(generator, labels, (side, side), **how), device, CALLS[mode]
    )
    rows = images if cfg_scale == 1 else 2 * images
    bound = options.copy_rate / bytes_a_token(generator, rows, side**2, kind) / side**2 * images
    rates = dict(
        first_s=first,
        best_s=min(others),
        tokens_s=images * side**2 / min(others),
        images_s=images / min(others),
    )
    row = dict(
        size=size,
        images=images,
        rows=rows,
        cfg_scale=cfg_scale,
        mode=mode,
        dtype=str(kind).removeprefix("torch."),
    )
    return (
        row
        | rates
        | dict(
            bound_images_s=bound,
            of_bound=images / min(others) / bound,
            copy_gb_s=options.copy_rate / 1e9,
        )
    )


def decoding(options):
    """Return a row: indices to images of 256 px, eight at a time, in float32 as the library does
    it.
    """
    tokenizer = Tokenizer(SMALL if options.quick else TOKENIZERS["VQ-16"]).to(options.device).eval()
    side = 4 if options.quick else 16
    indices = torch.zeros(8, side, side, dtype=torch.long, device=options.device)
    with torch.no_grad():
        first, *others = seconds(lambda: tokenizer.decode(indices), options.device, 4)
    return dict(
        size="decoder",
        images=8,
        dtype="float32",
        first_s=first,
        best_s=min(others),
        images_s=8 / min(others),
    )


def measure(options):
    """Yield the rows."""
    for size in ["tiny"] if options.quick else options.sizes:
        torch.manual_seed(0)
        config = TINY if options.quick else GENERATORS[size]
        generator = Generator(config, CODES).to(options.device).eval().requires_grad_(False)
        for mode, kind, images, cfg_scale in CASES[options.device.type]:
            yield drawing(
                size, generator, mode, kind, 4 if options.quick else images, cfg_scale, options
            )
    yield decoding(options)


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="a tiny generator: to see that it runs"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["L", "B"], help="names of gear.generator.config.GENERATORS"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.device = open_device(options.device)
    options.copy_rate = copy_rate(options.device)
    rows = []
    for row in measure(options):
        rows.append(row | dict(device=str(options.device), card=card(options.device)))
        print(
            "  ".join(
                f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()
            ),
            flush=True,
        )
        write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}")


if __name__ == "__main__":
    main()
