"""How fast a training step is, where its time goes, and what bounds it: ours beside a plain baseline that computes the same.

`python benchmarks/step.py [--quick] [--recipes NAME ...] [--precision bf16] [--compile]` runs each stage of each preset on
noise, without parents. The baseline is the loop that one would write first: the whole matrix of affinities for every read-out,
eager, every loss read and the assignment's statistics computed at every step. Both take the same losses from the same weights;
they take turns, and the median of a step's seconds counts. Utilisation is the FLOPs of `gear train --dry-run` over what the
device does in large products, which is measured first. It prints a table and writes benchmarks/step.csv.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

import pandas as pd
import torch

from gear.analysis import codes
from gear.config import UserError
from gear.price import price
from gear.recipes import recipe
from gear.tokenizer import readout
from gear.training.objectives import STAGES
from gear.training.state import State, step_seed

OUT = Path(__file__).with_suffix(".csv")
RECIPES = ["scenes-tokenizer", "scenes-joint", "scenes-gear", "cifar10-tokenizer", "cifar10-joint", "cifar10-gear"]


def prepared(name, options):
    """Return a recipe's Config without parents and without what is not on this machine, and why."""
    config = replace(recipe(name), stage=recipe(name).stage, precision=options.precision or recipe(name).precision)
    config = replace(config, objective=replace(config.objective, lpips_weight=0.0, gan_start=0.0))
    if config.stage != "generator":
        config = replace(config, tokenizer_run="")
    config = replace(config, data=replace(config.data, source="scenes"))  # noise stands in for the images of any source
    most = 32 if options.device == "cpu" else config.batch_size
    return replace(config, batch_size=options.batch or min(most, config.batch_size))


class Lab:
    """A state on a device, and noise to train it on."""

    def __init__(self, config, options):
        self.config, self.device = config, torch.device(options.device)
        torch.manual_seed(0)
        if (
            config.stage == "generator"
        ):  # any tokenizer will do: the state is built as a joint one, and updated as its own stage
            joint = State(replace(config, stage="joint", tokenizer_run=""), self.device, options.accumulate)
            joint.config = config
            joint.tokenizer.eval().requires_grad_(False)
            self.state = joint
        else:
            self.state = State(config, self.device, options.accumulate)
        if config.tokenizer.init_from_data:
            self.state.tokenizer.skip_in.weight.data.normal_(0, 0.1)
        self.state.prepare(options.checkpointing, False)
        rng = torch.Generator().manual_seed(1)
        size = config.data.image_size
        self.images = torch.rand(config.batch_size, 3, size, size, generator=rng) * 2 - 1
        self.labels = torch.randint(0, config.generator.num_classes, (config.batch_size,), generator=rng)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, clock=None):
        """Take a step as gear.training.loop does; `clock` {part: seconds} is added to, with a wait after every part."""
        state, mark = self.state, self.watch(clock)
        torch.manual_seed(step_seed(0, state.step))
        for batch in state.batches(self.images, self.labels):
            mark("tokenizer and teacher forward")
            for update in STAGES[self.config.stage]:
                with state.autocast():
                    update(state, batch)
                mark(update.__name__)
        losses = state.descend()
        mark("clip and step")
        state.finish_step()
        mark("averages")
        return losses

    def watch(self, clock):
        """Return a function that books the time since it was last called under a name."""
        if clock is None:
            return lambda part: None
        self.wait()
        last = [time.perf_counter()]

        def mark(part):
            self.wait()
            clock[part] = clock.get(part, 0.0) + time.perf_counter() - last[0]
            last[0] = time.perf_counter()

        return mark

    def plain_step(self):
        """Take the step of the baseline."""
        state = self.state
        with whole_matrices():
            torch.manual_seed(step_seed(0, state.step))
            for batch in state.batches(self.images, self.labels):
                for update in STAGES[self.config.stage]:
                    with state.autocast():
                        told = update(state, batch)
                    {name: value.item() for name, value in told.items()}
                if batch.tokenized is not None:
                    affinity = batch.tokenized.quantized.affinity.dense.detach().flatten(0, -2)
                    codes.assignment(affinity, self.config.objective.tau)
                codes.usage(batch.indices, self.config.tokenizer.codebook_size)
            losses = state.descend()
            state.finish_step()
        return {name: value.item() for name, value in losses.items()}


@contextlib.contextmanager
def whole_matrices():
    """Form every affinity whole, however large."""
    before, readout.WHOLE = readout.WHOLE, 2**62
    try:
        yield
    finally:
        readout.WHOLE = before


def peak_flops(device, precision):
    """Return the FLOP/s of large products on the device, the best of five."""
    kind = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=kind), 0.0
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def measure(name, options):
    """Print and return the rows of a recipe: ours and the baseline."""
    config = prepared(name, options)
    try:
        ours, plain = Lab(config, options), Lab(config, options)
        flops = config.batch_size * sum(p.training for p in price(config).passes)
    except UserError as error:
        print(f"{name:28} not measured: {str(error)[:90]}")
        return [dict(recipe=name, note=f"not measured: {str(error)[:90]}")]
    close = 1e-2 if config.precision == "bf16" else 1e-3
    first = [ours.step(), plain.plain_step()]  # the same weights, the same draws: the same losses
    assert all(abs(float(v) - float(first[1][k])) <= close * abs(float(v)) + close / 10 for k, v in first[0].items()), first
    if options.compile:
        ours.state.prepare(options.checkpointing, True)
        ours.step()
    seconds, clock = {"gear": [], "plain": []}, {}
    for _ in range(options.steps):
        for who, lab, step in (("gear", ours, ours.step), ("plain", plain, plain.plain_step)):
            lab.wait()
            start = time.perf_counter()
            step()
            lab.wait()
            seconds[who].append(time.perf_counter() - start)
    for _ in range(max(1, options.steps // 2)):
        ours.step(clock)
    peak, rows = peak_flops(ours.device, config.precision), []
    for who, times in seconds.items():
        middle = statistics.median(times)
        row = dict(recipe=name, stage=config.stage, who=who, device=options.device, precision=config.precision)
        row |= dict(batch=config.batch_size, images_s=config.batch_size / middle, utilisation=flops / middle / peak)
        row |= dict(tflops_in_products=peak / 1e12, peak_mib=memory(name, who, options), note="")
        if who == "gear":
            total = sum(clock.values())
            row["where"] = ", ".join(f"{part} {share / total:.0%}" for part, share in clock.items())
            row["times_plain"] = statistics.median(seconds["plain"]) / middle
        rows.append(row)
        ratio = f"{row['times_plain']:5.2f} x the plain one" if who == "gear" else ""
        print(f"{name:24} {who:6} {row['images_s']:9.1f} images/s {row['utilisation']:6.1%} {row['peak_mib']:8.0f} MiB {ratio}")
    print(f"{'':24} {rows[0]['where']}", flush=True)
    return rows


def memory(name, who, options):
    """Return the peak MiB that a step takes beside the state, in a process of its own (on a GPU: all that is held)."""
    command = [
        sys.executable,
        __file__,
        "--memory",
        name,
        who,
        "--device",
        options.device,
        "--accumulate",
        str(options.accumulate),
    ]
    command += ["--batch", str(options.batch), *(["--precision", options.precision] if options.precision else [])]
    command += ["--checkpointing"] * options.checkpointing
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def report_memory(name, who, options):
    lab = Lab(prepared(name, options), options)
    lab.step()  # moments and library buffers exist from here on
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(2):
        lab.step() if who == "gear" else lab.plain_step()
    if lab.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resident("VmHWM") - held)


def resident(what):
    """Return the MiB of memory that this process holds, VmRSS, or has held at most, VmHWM."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest recipe, two steps: to see that it runs")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0: the recipe's, on a CPU 32 at most")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=2, metavar=("RECIPE", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        report_memory(*options.memory, options)
        return
    if options.quick:
        options.recipes, options.steps = ["tiny-joint"], 2
    rows = []
    for name in options.recipes:
        rows += measure(name, options)
        pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.4g")
    print(f"{options.out}: load {os.getloadavg()[0]:.1f}; one core, on a CPU. No GPU: its rows are not measured."
          if options.device == "cpu" else str(options.out))  # fmt: skip


if __name__ == "__main__":
    main()
