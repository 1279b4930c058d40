"""Measure the time of each kernel in a training step, and the idle time of the device between them.

`python benchmarks/kernels.py [--quick] [--recipe NAME] [--device cuda]` profiles two training steps
in their default execution mode and writes benchmarks/kernels.csv: the 60 longest kernels by name,
with calls and milliseconds per step, and a row "idle". On a CPU the rows are operators, and there
is no row "idle".
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

from measure import card, wait, write_table
from step import Lab, prepared
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gear.device import open_device
from gear.experiments.recipes import recipe

OUT, STEPS, LONGEST = Path(__file__).with_suffix(".csv"), 2, 60


def profiled(lab):
    """Return the profile of STEPS steps, taken after two steps that are not profiled."""
    for _ in range(2):
        lab.step()
    wait(lab.device)
    gpu = [ProfilerActivity.CUDA] if lab.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profile_of_steps:
        for _ in range(STEPS):
            lab.step()
        wait(lab.device)
    return profile_of_steps


def rows_of(profile_of_steps, device):
    """Return one row for each of the longest kernels and, for a GPU, one for its idle time."""
    device_type = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [
        event
        for event in profile_of_steps.key_averages()
        if event.device_type == device_type and getattr(event, field)
    ]
    events.sort(key=lambda event: -getattr(event, field))
    rows = [
        dict(
            kernel=event.key,
            calls=event.count / STEPS,
            milliseconds=getattr(event, field) / 1e3 / STEPS,
        )
        for event in events[:LONGEST]
    ]
    if device.type == "cuda":
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile_of_steps.events()
            if event.device_type == device_type
        )
        rows.append(dict(kernel="idle", calls=0, milliseconds=idle(spans) / 1e3 / STEPS))
    return rows


def idle(spans):
    """Return the time between the first start and the last end that none of the (start, end)
    `spans`, sorted by start, covers.
    """
    total = 0.0
    reached = spans[0][0] if spans else 0.0
    for start, end in spans:
        total += max(0.0, start - reached)
        reached = max(reached, end)
    return total


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="the smallest recipe, to check that the benchmark runs"
    )
    parser.add_argument("--recipe", default="imagenet256-l-joint")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="give public teachers and LPIPS random weights",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.quick:
        options.recipe = "tiny-joint"
        options.batch = 0
    options.device = open_device(options.device, recipe(options.recipe).precision)
    options.precision = ""
    options.accumulate = 1
    options.checkpointing = False
    options.compile = False
    lab = Lab(prepared(options.recipe, options), options)
    about = dict(recipe=options.recipe, batch=lab.config.batch_size, card=card(options.device))
    rows = [row | about for row in rows_of(profiled(lab), options.device)]
    for row in rows[:20]:
        print(f"{row['milliseconds']:9.3f} ms {row['calls']:8.1f} calls  {row['kernel'][:90]}")
    write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}")


if __name__ == "__main__":
    main()
