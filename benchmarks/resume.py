"""Measure the cost of resuming: the seconds to save and to load a run's full state, and its size.

`python benchmarks/resume.py [--quick] [--recipes NAME ...]` builds each recipe's state, including
its optimizers' moments, and saves it as training does: written, flushed, renamed. It then loads it
into a second state and compares the two tensor for tensor. It prints a table and writes
benchmarks/resume.csv. The numbers hold for the disk of this machine.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import pandas as pd
import torch

from gear.config import to_dict
from gear.experiments.recipes import recipe
from gear.runs.run import Run
from gear.training.stages import STAGES
from gear.training.state import State

RECIPES = ["scenes-joint", "cifar10-joint", "imagenet100-128-joint", "imagenet256-b-joint"]
OUT = Path(__file__).with_suffix(".csv")


def state_of(name, device):
    """Return a recipe's state without parents, after one step on noise, so that every optimizer has
    moments.
    """
    config = replace(recipe(name), tokenizer_run="", batch_size=2)
    config = replace(
        config,
        objective=replace(config.objective, lpips_weight=0.0, gan_start=0.0, align_weight=0.0),
    )
    torch.manual_seed(0)
    state = State(config, device)
    size = config.data.image_size
    images = torch.randn(2, 3, size, size).clamp(-1, 1)
    labels = torch.zeros(2, dtype=torch.long)
    for batch in state.batches(images, labels):
        for update in STAGES[config.stage].updates:
            with state.autocast():
                update(state, batch)
    state.descend()
    state.finish_step()
    return state


def measure(name, device, repeats):
    """Return the row of a recipe: the best seconds of `repeats` saves and loads, and its MiB."""
    state = state_of(name, device)
    run = Run.create("resume", to_dict(state.config))
    best = {"save": float("inf"), "load": float("inf")}
    for _ in range(repeats):
        start = time.perf_counter()
        run.save_checkpoint(
            state.step,
            state.tensors(),
            {"step": 1, "config": run.config_hash, "meter": {"sums": {}, "counts": {}}},
        )
        best["save"] = min(best["save"], time.perf_counter() - start)
        folder = run.path / "checkpoints" / f"{state.step:07d}"
        size = sum(path.stat().st_size for path in folder.iterdir())
        restored = state_of(name, device)
        start = time.perf_counter()
        restored.restore(run)
        best["load"] = min(best["load"], time.perf_counter() - start)
        for file, tensors in state.tensors().items():
            restored_tensors = restored.tensors()[file]
            assert tensors.keys() == restored_tensors.keys() and all(
                torch.equal(tensor, restored_tensors[key]) for key, tensor in tensors.items()
            ), file
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    parameters = sum(p.numel() for module in state.networks.values() for p in module.parameters())
    return dict(
        recipe=name,
        device=device.type,
        parameters=parameters,
        save_s=best["save"],
        load_s=best["load"],
        mib=size / 2**20,
    )


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smallest recipe, once, to check that the benchmark runs",
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.quick:
        options.recipes = ["tiny-joint"]
        options.repeats = 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEAR_RUNS"] = folder
        for name in options.recipes:
            rows.append(measure(name, torch.device(options.device), options.repeats))
            row = rows[-1]
            print(
                f"{name:24} {row['parameters']:13,} parameters  save {row['save_s']:7.2f} s  load "
                f"{row['load_s']:7.2f} s "
                f"{row['mib']:9.1f} MiB",
                flush=True,
            )
    pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4g")
    print(options.out)


if __name__ == "__main__":
    main()
