"""Which kernels a training step spends its time in, and how long the device stands idle between
them.

`python benchmarks/kernels.py [--quick] [--recipe NAME] [--device cuda]` profiles two of our steps
as shipped and writes benchmarks/kernels.csv: the 60 longest kernels by name, with calls and
milliseconds a step, and a line "idle". On a CPU these are operators, and nothing is idle.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

from measure import card, wait, write_table
from step import Lab, prepared
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gear.device import open_device
from gear.experiments.recipes import recipe

OUT, STEPS, LONGEST = Path(__file__).with_suffix(".csv"), 2, 60


def profiled(lab):
    """Return the profile of STEPS steps, after two that are not profiled."""
    for _ in range(2):
        lab.step()
    wait(lab.device)
    gpu = [ProfilerActivity.CUDA] if lab.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as found:
        for _ in range(STEPS):
            lab.step()
        wait(lab.device)
    return found


def rows_of(found, device):
    """Return a row for each of the longest kernels, and one for the time that the device stands
    idle.
    """
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [e for e in found.key_averages() if e.device_type == kind and getattr(e, spent)]
    events.sort(key=lambda e: -getattr(e, spent))
    rows = [
        dict(kernel=e.key, calls=e.count / STEPS, milliseconds=getattr(e, spent) / 1e3 / STEPS)
        for e in events[:LONGEST]
    ]
    if device.type == "cuda":
        spans = sorted(
            (e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == kind
        )
        rows.append(dict(kernel="idle", calls=0, milliseconds=idle(spans) / 1e3 / STEPS))
    return rows


def idle(spans):
    """Return how long none of the (start, end) lasts, from the first start to the last end."""
    total, reached = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        total += max(0.0, start - reached)
        reached = max(reached, end)
    return total


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="the smallest recipe: to see that it runs"
    )
    parser.add_argument("--recipe", default="imagenet256-l-joint")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--random-weights", action="store_true", help="of public teachers and of LPIPS"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.recipe, options.batch = (
        ("tiny-joint", 0) if options.quick else (options.recipe, options.batch)
    )
    options.device = open_device(options.device, recipe(options.recipe).precision)
    options.precision, options.accumulate, options.checkpointing, options.compile = (
        "",
        1,
        False,
        False,
    )
    lab = Lab(prepared(options.recipe, options), options)
    about = dict(recipe=options.recipe, batch=lab.config.batch_size, card=card(options.device))
    rows = [row | about for row in rows_of(profiled(lab), options.device)]
    for row in rows[:20]:
        print(f"{row['milliseconds']:9.3f} ms {row['calls']:8.1f} calls  {row['kernel'][:90]}")
    write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}")


if __name__ == "__main__":
    main()
