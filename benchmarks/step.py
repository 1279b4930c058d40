"""Measure the speed of a training step and the time of each of its parts, and compare it with the
step of the public code.

`python benchmarks/step.py [--quick] [--recipes NAME ...] [--precision bf16] [--compile] [--device
cuda]` runs each stage of each preset on noise, without parents. These variants are compared:

    plain eager      a straightforward step: the full matrix of affinities for every read-out, every
                     loss read at every step, and the public trainer's statistics of the assignment,
                     at T = 1 and at tau, at every step
    plain compiled   the same with compiled networks, as in the public trainer; measured where ours
                     is compiled
    ours eager       gear's step without torch.compile and without a CUDA graph
    ours             gear's step in its default mode: on a GPU compiled, or one CUDA graph if it is
                     small; on a CPU eager, or compiled with --compile

All variants step the same state, with the same frozen networks in the same precision, and take
turns. Their losses are compared first. The median of the seconds per step counts. Utilisation is
the FLOPs of `gear train --dry-run` relative to the rate on the GPU's data sheet (`of_sheet`) and to
the rate of a large product, measured first (`of_measured`). `waits` counts how often a step waits
for the GPU. With --random-weights, public teachers and LPIPS have their true architecture with
seeded random weights, and the column `note` names them. The script prints a table and writes
benchmarks/step.csv.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import torch
from measure import card, data_sheet, memory_rise, product_rate, wait, write_table

from gear.config import UserError
from gear.cost.price import price
from gear.data.stream import upload
from gear.device import open_device
from gear.experiments.recipes import recipe
from gear.teachers import efficientnet
from gear.teachers.networks import build
from gear.teachers.vit import parse
from gear.tokenizer import readout
from gear.training.loop import Runtime
from gear.training.running import Running, way_of
from gear.training.stages import STAGES
from gear.training.state import State, step_seed

OUT = Path(__file__).with_suffix(".csv")
RECIPES = [
    "scenes-tokenizer",
    "scenes-joint",
    "scenes-gear",
    "cifar10-tokenizer",
    "cifar10-joint",
    "cifar10-gear",
]
TOP = (1, 10, 100, 1000)  # the public trainer logs the mass of this many most likely codes
LARGEST = (192, 128, 96, 64, 48, 32)  # batch sizes that --largest tries, on a GPU
LPIPS_HASH = "397923af"


# -- frozen networks without their weights ---------------------------------------------------------


@contextlib.contextmanager
def random_weights():
    """Give teachers and LPIPS loaded inside the block seeded random weights; yields the list of
    their names.
    """
    names = []

    def vit_weights(spec, side, offline=False, flag=""):
        names.append(spec)
        return Path("random"), build(parse(spec)[0], side).state_dict()

    def efficientnet_network():
        names.append(efficientnet.NAME)
        return efficientnet.build_network(), "random"

    def lpips_network(**_):
        names.append("LPIPS")
        return network(net="vgg", pnet_rand=True, pretrained=False, verbose=False)

    patches = {
        "gear.teachers.vit.fitting_weights": vit_weights,
        "gear.teachers.vit.file_hash": lambda path: "random",
        "gear.teachers.efficientnet.load_network": efficientnet_network,
    }
    if importlib.util.find_spec("lpips"):
        import lpips

        network = lpips.LPIPS
        patches |= {
            "lpips.LPIPS": lpips_network,
            "gear.evaluation.lpips.lpips_backbone": lambda: Path(__file__),
            "gear.evaluation.lpips.file_hash": lambda path: LPIPS_HASH,
        }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        yield names


# -- a step ----------------------------------------------------------------------------------------


def prepared(name, options):
    """Return a recipe's Config for training on noise, without parents."""
    config = replace(recipe(name), precision=options.precision or recipe(name).precision)
    config = replace(config, objective=replace(config.objective, gan_start=0.0))
    config = replace(config, data=replace(config.data, source="scenes"))
    if config.stage != "generator":
        config = replace(config, tokenizer_run="")
    largest_batch = 32 if options.device.type == "cpu" else config.batch_size
    return replace(config, batch_size=options.batch or min(largest_batch, config.batch_size))


class Lab:
    """A State on a device, noise to train it on, and the variants of its step."""

    def __init__(self, config, options):
        self.config = config
        self.device = options.device
        torch._dynamo.reset()  # otherwise an earlier recipe's sizes would make these sizes dynamic
        torch.manual_seed(0)
        with (
            random_weights()
            if options.random_weights
            else contextlib.nullcontext([]) as self.randomised
        ):
            # a generator's state is built as a joint one, which needs no parent's tokenizer, and is
            # updated as the stage "generator"
            joint = (
                replace(config, stage="joint", tokenizer_run="")
                if config.stage == "generator"
                else config
            )
            self.state = State(
                joint, self.device, options.accumulate, checkpointing=options.checkpointing
            )
        if config.stage == "generator":
            self.state.config = config
            self.state.tokenizer.eval().requires_grad_(False)
        if (
            config.objective.lpips_weight > 0
            and "discriminator" in self.state.networks
            and self.state.lpips is None
        ):
            raise UserError(
                "LPIPS's VGG16 weights are not on this machine. Use --random-weights to measure "
                "without them."
            )
        if config.tokenizer.init_from_data:
            self.state.tokenizer.skip_in.weight.data.normal_(0, 0.1)
        self.failures = []
        self.state.step = 1  # at step 0 the learning rate may be zero
        is_alone = options.accumulate == 1
        default = way_of(config, self.device, Runtime(compile=options.compile), is_alone)
        self.running = {mode: Running(self.state, mode) for mode in {"plain", default}}
        self.who = {"plain eager": "plain", "ours": default}  # {variant: execution mode}
        self.who |= {"ours eager": "plain"} if default != "plain" else {}
        self.who |= {"plain compiled": "compiled"} if default == "compiled" else {}
        rng = torch.Generator().manual_seed(1)
        size = config.data.image_size
        images = torch.rand(config.batch_size, 3, size, size, generator=rng) * 2 - 1
        labels = torch.randint(0, config.generator.num_classes, (config.batch_size,), generator=rng)
        self.samples = upload([images, labels], self.device)

    def gradients(self, who, mark=lambda part: None):
        """Compute every network's gradients as gear.training.loop does, in the variant `who`.

        `mark(part)` is called after each part.
        """
        state = self.state
        mode = self.who[who]
        is_plain = who.startswith("plain")
        torch.manual_seed(step_seed(0, state.step))
        stance = "default" if mode == "compiled" else "force_eager"
        with (
            torch.compiler.set_stance(stance),
            full_matrices() if is_plain else contextlib.nullcontext(),
        ):
            if mode == "graphed":
                self.running[mode](self.samples)
                mark("one graph")
                return
            for batch in state.batches(*self.samples):
                mark("tokenizer and teacher forward")
                for update in STAGES[self.config.stage].updates:
                    with state.autocast():
                        losses = update(state, batch)
                    if is_plain:
                        {name: value.item() for name, value in losses.items()}
                    mark(update.__name__)
                if is_plain:
                    public_statistics(batch, self.config)
                    mark("statistics")

    def step(self, who="ours", mark=lambda part: None):
        """Take a step in the variant `who`; returns its losses."""
        self.gradients(who, mark)
        losses = self.state.descend()
        mark("clip and step")
        self.state.finish_step()
        mark("averages")
        return (
            {name: value.item() for name, value in losses.items()}
            if who.startswith("plain")
            else losses
        )

    def losses(self, who):
        """Return the losses of the next step without changing the weights."""
        self.gradients(who)
        losses = {
            name: float(value)
            for terms in self.state.terms.values()
            for name, value in terms.items()
        }
        self.state.discard()
        return losses

    def clock(self, who):
        """Take a step and return {part: seconds}, waiting for the device after every part."""
        seconds = {}
        last_time = 0.0

        def mark(part):
            nonlocal last_time
            wait(self.device)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - last_time
            last_time = time.perf_counter()

        wait(self.device)
        last_time = time.perf_counter()
        self.step(who, mark)
        return seconds

    @property
    def note(self):
        """What differs from a real run: random weights, and execution modes that failed."""
        failed_modes = [
            f"not {mode}: it failed"
            for mode, running in self.running.items()
            if running.mode != mode
        ]
        random = [f"random weights: {', '.join(self.randomised)}"] if self.randomised else []
        return "; ".join(random + failed_modes + self.failures)


@torch.no_grad()
def public_statistics(batch, config):
    """Compute what the public trainer logs at every step: the share of codes used, and the entropy
    and top masses of the assignment's rows.

    They are computed in float32 on the full matrix, at T = 1 and at tau, and every number is read.
    """
    size = config.tokenizer.codebook_size
    (batch.indices.unique().numel() / size)
    if batch.tokenized is None:
        return
    affinity = batch.tokenized.quantized.affinity.dense.detach().flatten(0, -2)
    for temperature in (1.0, config.objective.tau):
        logp = (affinity / temperature).log_softmax(-1)
        p = logp.exp()
        entropy = -(p * logp).sum(-1).mean()
        entropy.item()
        entropy.exp().item()
        mass = p.topk(min(max(TOP), size), -1).values.cumsum(-1).mean(0)
        [mass[m - 1].item() for m in TOP if m <= size]


@contextlib.contextmanager
def full_matrices():
    """Form every affinity as a full matrix, however large."""
    with mock.patch.object(readout, "WHOLE", 2**62):
        yield


# -- measurement -----------------------------------------------------------------------------------


def measure(name, options):
    """Print and return the rows of a recipe, one per variant of its step."""
    config = prepared(name, options)
    about = dict(
        recipe=name,
        who="",
        stage=config.stage,
        device=str(options.device),
        card=card(options.device),
    )
    about |= dict(precision=config.precision, batch=config.batch_size, note="")
    try:
        lab = Lab(config, options)
        cost = price(config, lab.who["ours"] == "compiled")  # the estimate of gear train --dry-run
    except UserError as error:
        print(f"{name:28} not measured: {str(error)[:90]}")
        return [about | dict(note=f"not measured: {error}")]
    flops = config.batch_size * sum(p.training for p in cost.passes)
    about |= dict(dry_run_mib=cost.memory(config.batch_size // options.accumulate) / 2**20)
    compare_losses(lab)
    peaks = {
        "sheet": sheet_rate(options.device, config.precision),
        "measured": measured_rate(options.device, config.precision),
    }
    rows = {who: about | dict(who=who) | row for who, row in timed(lab, options.steps).items()}
    for who, row in rows.items():
        median = row.pop("median")
        row |= dict(note=lab.note, milliseconds=1e3 * median, images_s=config.batch_size / median)
        for peak, rate in peaks.items():
            row |= (
                {f"{peak}_tflops": rate / 1e12, f"of_{peak}": flops / median / rate} if rate else {}
            )
        if options.device.type == "cpu":
            row["peak_mib"] = memory_of_child(name, who, options)
        print(line(row), flush=True)
        print(f"{'':24} {row['where']}", flush=True)
    return list(rows.values())


def compare_losses(lab):
    """Raise AssertionError unless all variants have the same losses on the same weights.

    A variant that fails is left out. If "ours" cannot be compiled or graphed, it is measured in
    plain mode, as in training. The tolerance is larger for compiled code, which draws dropout
    differently.
    """
    tolerance = 1e-2 if lab.config.precision == "bf16" or "compiled" in lab.who.values() else 1e-3
    losses = {}
    for who in list(lab.who):
        try:
            losses[who] = lab.losses(who)
        # the compiler failed, or memory ran out: the other variants are still measured
        except Exception as error:
            mode = lab.who.pop(who)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            lab.failures.append(f"{who} ({mode}) failed: {reason[:200]}")
            print(lab.failures[-1], flush=True)
            lab.state.discard()
            if who == "ours" and mode != "plain":
                lab.who[who] = "plain"
                losses[who] = lab.losses(who)
    ours = losses["ours"]
    for who, values in losses.items():
        assert values.keys() == ours.keys(), losses
        is_close = [
            abs(value - ours[term]) <= tolerance * abs(value) + tolerance
            for term, value in values.items()
        ]
        assert all(is_close), (who, losses)


def timed(lab, count):
    """Return {variant: columns}: the median seconds of `count` steps, the shares of the parts,
    memory and waits. The variants take turns.
    """
    rows = {}
    seconds = {who: [] for who in lab.who}
    for who in lab.who:
        take_step = functools.partial(lab.step, who)
        take_step()  # a first step that is not timed
        rise, held = memory_rise(take_step, lab.device)
        parts = lab.clock(who)
        total = sum(parts.values())
        rows[who] = dict(waits=count_waits(take_step, lab.device))
        rows[who]["where"] = ", ".join(
            f"{part} {share / total:.0%}" for part, share in parts.items()
        )
        if lab.device.type == "cuda":
            rows[who] |= dict(peak_mib=rise + held, held_mib=held)
    for _ in range(count):
        for who, times in seconds.items():
            wait(lab.device)
            start = time.perf_counter()
            lab.step(who)
            wait(lab.device)
            times.append(time.perf_counter() - start)
    return {who: dict(median=statistics.median(seconds[who])) | row for who, row in rows.items()}


def count_waits(function, device):
    """Return how often `function` waits for the GPU, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def sheet_rate(device, precision):
    """Return the FLOP/s on the GPU's data sheet in the precision of a run, or None for an unknown
    device.
    """
    sheet = data_sheet(device)
    return sheet and 1e12 * getattr(sheet, precision)


def measured_rate(device, precision):
    """Return the measured FLOP/s of a large product in the precision of a run."""
    bf16 = precision == "bf16" and device.type == "cuda"  # many CPUs have no bf16 arithmetic
    return product_rate(device, torch.bfloat16 if bf16 else torch.float32)


def line(row):
    """Return a row as a line of text."""
    share = row.get("of_measured", float("nan"))
    return (
        f"{row['recipe']:24} {row['who']:14} {row['images_s']:9.1f} images/s {share:6.1%} of the "
        f"measured peak {row['peak_mib']:8.0f} MiB"
    )


def memory_of_child(name, who, options):
    """Return the peak MiB that a step needs besides the state, measured in a separate process."""
    words = [sys.executable, __file__, "--memory", name, who, "--device", str(options.device)]
    words += ["--accumulate", str(options.accumulate), "--batch", str(options.batch)]
    words += ["--precision", options.precision] if options.precision else []
    flags = [
        flag for flag in ("checkpointing", "compile", "random_weights") if getattr(options, flag)
    ]
    words += [f"--{flag.replace('_', '-')}" for flag in flags]
    done = subprocess.run(words, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def report_memory(name, who, options):
    """Measure the memory of a step and print it for `memory_of_child`, in the child process."""
    lab = Lab(prepared(name, options), options)
    lab.step(who)  # a first step, which allocates moments and library buffers
    print(memory_rise(lambda: [lab.step(who) for _ in range(2)], options.device)[0])


def largest(name, options):
    """Return a row for our step with the largest batch of LARGEST that fits on the GPU; on a CPU,
    with the batch of the options.
    """
    sizes = LARGEST if options.device.type == "cuda" else [prepared(name, options).batch_size]
    for batch in sizes:
        options.batch = batch
        row = dict(
            recipe=name,
            who="ours",
            device=str(options.device),
            card=card(options.device),
            batch=batch,
        )
        try:
            lab = Lab(prepared(name, options), options)
            lab.step()
            rise, held = memory_rise(lab.step, options.device)
            start = time.perf_counter()
            [lab.step() for _ in range(3)]
            wait(options.device)
            row |= dict(
                images_s=3 * batch / (time.perf_counter() - start),
                peak_mib=rise + held,
                held_mib=held,
            )
            print(row, flush=True)
            return [row]
        except torch.OutOfMemoryError:
            print(f"{name}: {batch} images do not fit", flush=True)
            lab = None
            torch.cuda.empty_cache()
    return [row | dict(note="no batch fits")]


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smallest recipes, two steps, to check that the benchmark runs",
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--batch", type=int, default=0, help="images per step; 0: the recipe's, on a CPU at most 32"
    )
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="give public teachers and LPIPS random weights",
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="measure only our step, at the largest batch that fits",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", nargs=2, metavar=("RECIPE", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.device = open_device(options.device)
    if options.memory:
        report_memory(*options.memory, options)
        return
    if options.quick:
        options.recipes = [name for name in options.recipes if name.startswith("tiny")] or [
            "tiny-joint"
        ]
        options.steps = 2
        options.batch = 0
    rows = []
    for name in options.recipes:
        open_device(str(options.device), options.precision or recipe(name).precision)
        rows += (largest if options.largest else measure)(name, options)
        write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
