"""Measure the speed of sampling, in tokens and images per second, and compare it with the bound set
by the memory bandwidth.

`python benchmarks/sampling.py [--quick] [--device cuda]` samples 16 x 16 tokens from generators of
LlamaGen's sizes with random weights, in bfloat16 and once in float32. Tokens are sampled one by one
from Python ("eager") or with one CUDA graph ("graph"). The first batch, which includes the set-up
of kernels and the capture, is timed separately from the best of the others.

The bound (`bound_images_s`) follows from the bytes that one token reads: all weights of the blocks
and of the head, and the filled part of the key and value cache, which is half of it on average. The
bandwidth is that of a measured copy, and `of_bound` is the share of the bound that is reached. The
script prints a table and writes benchmarks/sampling.csv, with a separate row for the decoder.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import torch
from measure import card, copy_rate, seconds, write_table

from gear.device import open_device
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.generator.model import Generator
from gear.generator.sampling import generate
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.tokenizer.model import Tokenizer

OUT = Path(__file__).with_suffix(".csv")
CODES = 16_384
TINY = GeneratorConfig(width=32, heads=2, layers=3, tap_layer=1, num_classes=10)
SMALL = TokenizerConfig(
    codebook_size=CODES, channels=8, channel_mult=(1, 2, 2), latent_channels=16, res_blocks=1
)
CASES = {  # (mode, dtype, images, cfg_scale): 1 is no guidance; else every image takes two rows
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
# number of calls: a graph is captured in the second call and replayed from the third on
CALLS = {"graph": 4, "eager": 2}


def bytes_per_token(generator, rows, length, dtype):
    """Return the bytes read to sample one token for each of `rows` sequences, as a mean over
    `length` tokens.

    The i-th token is sampled with i keys and values, including those of the condition.
    """
    config = generator.config
    weights = sum(
        p.numel()
        for part in (generator.blocks, generator.norm, generator.head)
        for p in part.parameters()
    )
    cache = rows * config.layers * 2 * config.width * (length + 1) / 2
    return dtype.itemsize * (weights + cache)


def sampling_row(size, generator, mode, dtype, images, cfg_scale, options):
    """Return a row: the speed of sampling `images` token grids, repeated a few times."""
    device = options.device
    side = 4 if options.quick else 16
    labels = torch.arange(images) % generator.config.num_classes
    settings = dict(cfg_scale=cfg_scale, dtype=dtype, graph=mode == "graph")
    first, *others = seconds(
        lambda: generate(generator, labels, (side, side), **settings), device, CALLS[mode]
    )
    rows = images if cfg_scale == 1 else 2 * images
    bound = options.copy_rate / bytes_per_token(generator, rows, side**2, dtype) / side**2 * images
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
        dtype=str(dtype).removeprefix("torch."),
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


def decoding_row(options):
    """Return a row: the speed of decoding indices to images of 256 px, eight at a time, in float32
    as the library does.
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
    """Yield the rows of the table."""
    for size in ["tiny"] if options.quick else options.sizes:
        torch.manual_seed(0)
        config = TINY if options.quick else GENERATORS[size]
        generator = Generator(config, CODES).to(options.device).eval().requires_grad_(False)
        for mode, dtype, num_images, cfg_scale in CASES[options.device.type]:
            images = 4 if options.quick else num_images
            yield sampling_row(size, generator, mode, dtype, images, cfg_scale, options)
    yield decoding_row(options)


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="a tiny generator, to check that the benchmark runs"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["L", "B"], help="names in gear.generator.config.GENERATORS"
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
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            ),
            flush=True,
        )
        write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}")


if __name__ == "__main__":
    main()
