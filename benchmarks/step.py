"""How fast a training step is, where its time goes, and what bounds it: ours beside the public one.

`python benchmarks/step.py [--quick] [--recipes NAME ...] [--precision bf16] [--compile] [--device
cuda]` runs each stage of each preset on noise, without parents. Who is compared:

    plain eager      the step as one would write it: the whole matrix of affinities for every
                     read-out, every loss read, and the public trainer's statistics of the
                     assignment, at T = 1 and at tau, at every step
    plain compiled   the same, its networks compiled as ours are, where they are: as the public
                     trainer does it
    ours eager       without torch.compile, and without a CUDA graph
    ours             as shipped: on a GPU compiled, or where it is small one CUDA graph; on a CPU
                     eager, but with --compile

All are steps of one state, compiled or not, with the same frozen networks in the same precision,
and take turns; their losses are compared first. The median of a step's seconds counts. Utilisation
is the FLOPs of `gear train --dry-run` over what the card's data sheet says (`of_sheet`) and over
what a large product reaches on it, measured first (`of_measured`). `waits` is how often a step
waits for a GPU. With --random-weights public teachers and LPIPS have their true architecture and
seeded random weights, and the note names them. It prints a table and writes benchmarks/step.csv.
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

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

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
TOP = (1, 10, 100, 1000)  # codes whose mass the public trainer logs
LARGEST = (192, 128, 96, 64, 48, 32)  # batch sizes that --largest tries, on a GPU
LPIPS_HASH = "397923af"


# -- frozen networks without their weights ---------------------------------------------------------


@contextlib.contextmanager
def random_weights():
    """Give teachers and LPIPS that are loaded inside the block seeded random weights; yields the
    names of those.
    """
    invented = []

    def vit_weights(spec, side, offline=False, flag=""):
        invented.append(spec)
        return Path("random"), build(parse(spec)[0], side).state_dict()

    def efficientnet_network():
        invented.append(efficientnet.NAME)
        return efficientnet.build_network(), "random"

    def lpips_network(**_):
        invented.append("LPIPS")
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
        yield invented


# -- a step ----------------------------------------------------------------------------------------


def prepared(name, options):
    """Return a recipe's Config without parents, on noise in place of its images."""
    config = replace(recipe(name), precision=options.precision or recipe(name).precision)
    config = replace(config, objective=replace(config.objective, gan_start=0.0))
    config = replace(config, data=replace(config.data, source="scenes"))
    if config.stage != "generator":
        config = replace(config, tokenizer_run="")
    most = 32 if options.device.type == "cpu" else config.batch_size
    return replace(config, batch_size=options.batch or min(most, config.batch_size))


class Lab:
    """A state on a device, and noise to train it on."""

    def __init__(self, config, options):
        self.config, self.device = config, options.device
        torch._dynamo.reset()  # else another recipe's sizes would make those of this one variable
        torch.manual_seed(0)
        with (
            random_weights()
            if options.random_weights
            else contextlib.nullcontext([]) as self.invented
        ):
            # any tokenizer will do for a generator: the state is built as a joint one, and updated
            # as its own stage
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
                "VGG16's weights, for LPIPS, are not on this machine: --random-weights goes on "
                "without them."
            )
        if config.tokenizer.init_from_data:
            self.state.tokenizer.skip_in.weight.data.normal_(0, 0.1)
        self.failures = []
        self.state.step = 1  # the first step's learning rate may be none
        is_alone = options.accumulate == 1
        shipped = way_of(config, self.device, Runtime(compile=options.compile), is_alone)
        self.running = {way: Running(self.state, way) for way in {"plain", shipped}}
        self.who = {"plain eager": "plain", "ours": shipped} | (
            {"ours eager": "plain"} if shipped != "plain" else {}
        )
        self.who |= {"plain compiled": "compiled"} if shipped == "compiled" else {}
        rng = torch.Generator().manual_seed(1)
        size = config.data.image_size
        images = torch.rand(config.batch_size, 3, size, size, generator=rng) * 2 - 1
        labels = torch.randint(0, config.generator.num_classes, (config.batch_size,), generator=rng)
        self.samples = upload([images, labels], self.device)

    def gradients(self, who, mark=lambda part: None):
        """Compute every network's gradients, as gear.training.loop does; `mark(part)` is called
        after each part.
        """
        state, way, plain = self.state, self.who[who], who.startswith("plain")
        torch.manual_seed(step_seed(0, state.step))
        stance = "default" if way == "compiled" else "force_eager"
        with (
            torch.compiler.set_stance(stance),
            whole_matrices() if plain else contextlib.nullcontext(),
        ):
            if way == "graphed":
                self.running[way](self.samples)
                mark("one graph")
                return
            for batch in state.batches(*self.samples):
                mark("tokenizer and teacher forward")
                for update in STAGES[self.config.stage].updates:
                    with state.autocast():
                        losses = update(state, batch)
                    if plain:
                        {name: value.item() for name, value in losses.items()}
                    mark(update.__name__)
                if plain:
                    public_statistics(batch, self.config)
                    mark("statistics")

    def step(self, who="ours", mark=lambda part: None):
        """Take a step; returns its losses."""
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
        """Return the losses that a step would have, and leave the weights as they are."""
        self.gradients(who)
        losses = {
            name: float(value)
            for terms in self.state.terms.values()
            for name, value in terms.items()
        }
        self.state.discard()
        return losses

    def clock(self, who):
        """Take a step and return {part: seconds}, the device waited for after every part."""
        seconds, last = {}, [0.0]

        def mark(part):
            wait(self.device)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - last[0]
            last[0] = time.perf_counter()

        wait(self.device)
        last[0] = time.perf_counter()
        self.step(who, mark)
        return seconds

    @property
    def note(self):
        """Say what is not as a run has it: random weights, and a way that did not work."""
        fallen = [
            f"not {way}: it failed" for way, running in self.running.items() if running.mode != way
        ]
        words = [f"random weights: {', '.join(self.invented)}"] if self.invented else []
        return "; ".join(words + fallen + self.failures)


@torch.no_grad()
def public_statistics(batch, config):
    """Compute what the public trainer logs of a step: entropy and top masses of a row's assignment,
    codes that are used.

    In float32 on the whole matrix, at T = 1 and at tau, every number read.
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
def whole_matrices():
    """Form every affinity whole, however large."""
    with mock.patch.object(readout, "WHOLE", 2**62):
        yield


# -- how it is measured ----------------------------------------------------------------------------


def measure(name, options):
    """Print and return a recipe's rows, a way of taking its step each."""
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
        cost = price(config, lab.who["ours"] == "compiled")  # as gear train --dry-run tells it
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
        middle = row.pop("median")
        row |= dict(note=lab.note, milliseconds=1e3 * middle, images_s=config.batch_size / middle)
        for peak, rate in peaks.items():
            row |= (
                {f"{peak}_tflops": rate / 1e12, f"of_{peak}": flops / middle / rate} if rate else {}
            )
        if options.device.type == "cpu":
            row["peak_mib"] = memory_of_child(name, who, options)
        print(line(row), flush=True)
        print(f"{'':24} {row['where']}", flush=True)
    return list(rows.values())


def compare_losses(lab):
    """Raise AssertionError unless everybody has the same losses, of the same weights; leave out who
    has none.

    Where ours cannot be compiled or graphed it is plain, as in training. Compiled code drops out
    others.
    """
    close = 1e-2 if lab.config.precision == "bf16" or "compiled" in lab.who.values() else 1e-3
    losses = {}
    for who in list(lab.who):
        try:
            losses[who] = lab.losses(who)
        except (
            Exception
        ) as error:  # the compiler's, or no memory: the others are still to be measured
            way = lab.who.pop(who)
            lab.failures.append(
                f"{who} ({way}) failed: "
                f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}"
            )
            print(lab.failures[-1], flush=True)
            lab.state.discard()
            if who == "ours" and way != "plain":
                lab.who[who] = "plain"
                losses[who] = lab.losses(who)
    first = losses["ours"]
    for who, values in losses.items():
        assert values.keys() == first.keys(), losses
        assert all(abs(v - first[k]) <= close * abs(v) + close for k, v in values.items()), (
            who,
            losses,
        )


def timed(lab, count):
    """Return {who: median seconds of `count` steps, parts, memory, waits}; everybody takes
    turns.
    """
    rows, seconds = {}, {who: [] for who in lab.who}
    for who in lab.who:
        take = functools.partial(lab.step, who)
        take()  # not timed
        rise, held = memory_rise(take, lab.device)
        parts = lab.clock(who)
        total = sum(parts.values())
        rows[who] = dict(waits=count_waits(take, lab.device))
        rows[who]["where"] = ", ".join(
            f"{part} {share / total:.0%}" for part, share in parts.items()
        )
        if lab.device.type == "cuda":
            rows[who] |= dict(peak_mib=rise + held, held_mib=held)
    for _ in range(count):
        for who, taken in seconds.items():
            wait(lab.device)
            start = time.perf_counter()
            lab.step(who)
            wait(lab.device)
            taken.append(time.perf_counter() - start)
    return {who: dict(median=statistics.median(seconds[who])) | row for who, row in rows.items()}


def count_waits(function, device):
    """Return how often `function` waits for a GPU by itself, None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def sheet_rate(device, precision):
    """Return the FLOP/s of a card's data sheet in the type of a run's products, None where there is
    no sheet of it.
    """
    sheet = data_sheet(device)
    return sheet and 1e12 * getattr(sheet, precision)


def measured_rate(device, precision):
    """Return the FLOP/s of a large product in the type of a run's products."""
    bf16 = precision == "bf16" and device.type == "cuda"  # many CPUs have no unit for it
    return product_rate(device, torch.bfloat16 if bf16 else torch.float32)


def line(row):
    """Say a row in a line."""
    share = row.get("of_measured", float("nan"))
    return (
        f"{row['recipe']:24} {row['who']:14} {row['images_s']:9.1f} images/s {share:6.1%} of the "
        "measured peak "
        f"{row['peak_mib']:8.0f} MiB"
    )


def memory_of_child(name, who, options):
    """Return the peak MiB that a step takes beside the state, in a process of its own."""
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
    """Print what `memory_of_child` reads."""
    lab = Lab(prepared(name, options), options)
    lab.step(who)  # moments and library buffers exist from here on
    print(memory_rise(lambda: [lab.step(who) for _ in range(2)], options.device)[0])


def largest(name, options):
    """Return a row of our step with the largest batch of LARGEST that a GPU holds, or on a CPU that
    was asked for.
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
        "--quick", action="store_true", help="the smallest recipes, two steps: to see that it runs"
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--batch", type=int, default=0, help="images a step; 0: the recipe's, on a CPU 32 at most"
    )
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="")
    parser.add_argument("--compile", action="store_true", help="on a CPU, too")
    parser.add_argument(
        "--random-weights", action="store_true", help="of public teachers and of LPIPS"
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="measure our step at the largest batch that fits, instead",
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
        options.steps, options.batch = 2, 0
    rows = []
    for name in options.recipes:
        open_device(str(options.device), options.precision or recipe(name).precision)
        rows += (largest if options.largest else measure)(name, options)
        write_table(rows, options.out)
    print(f"{options.out}: {card(options.device)}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
