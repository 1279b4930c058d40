"""Measure the peak rates of a device: copies, products, the tokenizer's convolution and norm,
launches, attention.

`python benchmarks/ceilings.py [--quick] [--device cuda]` times each operation alone on random data
and writes benchmarks/ceilings.csv. Rates count bytes read and written, or two FLOPs for a
multiplication and an addition. "attention, new lengths" is the time of the first call with each of
20 numbers of keys, because some kernels prepare a plan for each number; "known lengths" is the time
of the second call.
"""

import argparse
import functools
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import torch
import torch.nn.functional as F
from measure import card, copy_rate, product_rate, seconds, write_table
from torch.nn.attention import SDPBackend, sdpa_kernel

from gear.device import open_device

OUT = Path(__file__).with_suffix(".csv")
LAUNCHES = 1000
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def products(device):
    """Return {name: (value, unit)} of copies and large products."""
    rates = {"copy": (copy_rate(device) / 1e9, "GB/s")}
    rates["product, bf16"] = product_rate(device, torch.bfloat16) / 1e12, "TFLOP/s"
    for name, precision in (("float32", "float32"), ("TF32", "bf16")):
        if device.type == "cuda" or name == "float32":
            open_device(str(device), precision)
            rates[f"product, {name}"] = product_rate(device) / 1e12, "TFLOP/s"
    return rates


def convolution(device, size, batch, channels=128):
    """Return {name: (value, unit)} of a 3 x 3 convolution in bf16, channels last: its forward pass,
    its forward pass with both gradients, and a norm with SiLU.
    """
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(
        device, torch.bfloat16, memory_format=torch.channels_last
    )
    x = torch.randn(batch, channels, size, size, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    flops = 2 * 9 * channels**2 * size**2 * batch
    gradient = torch.ones_like(layer(x))
    forward = statistics.median(seconds(lambda: layer(x), device)[1:])
    both = statistics.median(seconds(lambda: layer(x).backward(gradient), device)[1:])
    flop_rates = {
        "convolution, forward": flops / forward,
        "convolution, with both gradients": 3 * flops / both,
    }
    norm = torch.nn.GroupNorm(32, channels).to(device, torch.bfloat16)
    with torch.no_grad():
        norm_seconds = statistics.median(seconds(lambda: F.silu(norm(x)), device)[1:])
    rates = {name: (rate / 1e12, "TFLOP/s") for name, rate in flop_rates.items()}
    num_bytes = 2 * x.numel() * x.element_size()
    return rates | {"GroupNorm and SiLU": (num_bytes / norm_seconds / 1e9, "GB/s")}


def launches(device):
    """Return {name: (value, unit)} of a minimal operation, dominated by its launch."""
    x = torch.zeros((), device=device)

    def launch_all():
        for _ in range(LAUNCHES):
            x.add_(1)

    return {"launches": (LAUNCHES / min(seconds(launch_all, device, 3)) / 1e3, "thousand/s")}


def attention(device, rows, lengths):
    """Return {name: (value, unit)}: milliseconds of attention of one query to each number of keys,
    at its first and its second call.
    """
    medians = {}
    for name, backend in BACKENDS.items() if device.type == "cuda" else ():
        for known in ("new", "known"):
            times = []
            for length in lengths:
                q, k, v = (
                    torch.randn(rows, 16, n, 64, device=device, dtype=torch.bfloat16)
                    for n in (1, length, length)
                )
                with sdpa_kernel(backend):
                    attend = functools.partial(F.scaled_dot_product_attention, q, k, v)
                    times += seconds(attend, device, 1)
            medians[f"{name} attention, {known} lengths"] = 1e3 * statistics.median(times), "ms"
    return medians


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to check that the benchmark runs"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    device = open_device(options.device)
    size, batch = (32, 2) if options.quick else (256, 32)
    measured = products(device) | convolution(device, size, batch) | launches(device)
    measured |= attention(device, 64, range(101, 121))
    rows = [
        dict(what=name, value=value, unit=unit, card=card(device))
        for name, (value, unit) in measured.items()
    ]
    for row in rows:
        print(f"{row['what']:36} {row['value']:10.4g} {row['unit']}", flush=True)
    write_table(rows, options.out)
    print(f"{options.out}: {card(device)}")


if __name__ == "__main__":
    main()
