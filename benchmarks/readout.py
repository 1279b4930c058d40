"""Compare the soft read-out by blocks of rows with the read-out through the full matrix and with
attention: seconds, peak memory and error.

`python benchmarks/readout.py [--quick] [--device cuda]` runs softmax(A / tau) E forward and
backward (to latents and codes, with E frozen, as in training), by blocks of rows and through the
(N, K) matrix. Both run alternately in one process on one core. The minimum of the repeats counts,
on a GPU their median. The library uses the matrix up to gear.tokenizer.readout.WHOLE elements; here
the blocks are measured for all shapes. Peak memory excludes the inputs, and on a CPU is measured in
a separate process. The error is the largest deviation of the read-out and its gradients from
float64, relative to the largest entry, on 512 rows in four blocks. The script prints a table and
writes benchmarks/readout.csv. A measurement that does not fit into memory is listed as not
measured.

On a GPU, blocks of other sizes are measured too, and everything runs in both precisions of a run:
only "bf16" allows TF32 products.

scaled_dot_product_attention is an alternative to the blocks, but it requires queries, keys and
values of the same width, whereas a code has width 8 and E about 1,000. Two remedies are measured,
on the shapes that are fast enough: padding latents and codes with zeros, and splitting E into
groups of columns, each with its own softmax. At these widths both are slower than the blocks; at
width 64 (--quick), padding is faster.
"""

import argparse
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import pandas as pd
import torch
import torch.nn.functional as F
from measure import card, memory_rise, seconds

from gear.device import open_device
from gear.tokenizer import readout
from gear.tokenizer.readout import Affinity

DIM = 8  # width of a code
TAU = 0.1  # the paper's guidance temperature
LIMIT = 300  # seconds that a measurement of memory may take
OUT = Path(__file__).with_suffix(".csv")
ATTENTION = 2**25  # largest number of elements of A for which attention is measured


def inputs(count, size, width, device):
    """Return unit latents and codes, a table E, and the gradient of the read-out."""
    rng = torch.Generator(device).manual_seed(0)
    shapes = ((count, DIM), (size, DIM), (size, width), (count, width))
    z, c, e, g = (torch.randn(shape, generator=rng, device=device) for shape in shapes)
    return [F.normalize(z, dim=-1), F.normalize(c, dim=-1), e, g]


def library(z, c, e):
    return Affinity(z, c, 2.0, -2.0).soft_readout(e, TAU)


def attention(z, c, e, width=None):
    """Read out by attention: all of E at once, or groups of `width` columns one by one."""
    width = width or e.shape[1]
    q, k = (F.pad(x, (0, width - DIM))[None, None] for x in (z, c))
    groups = [
        F.scaled_dot_product_attention(q, k, v[None, None], scale=2 / TAU)
        for v in e.split(width, 1)
    ]
    return torch.cat(groups, -1)[0, 0]


def attention_by_256(z, c, e):
    return attention(z, c, e, 256)


class Read(NamedTuple):
    """A read-out to measure: a function, and the settings of gear.tokenizer.readout for it."""

    function: object
    whole: int = 0  # replaces WHOLE
    block: int | None = None  # replaces BLOCK, unless None

    def __call__(self, z, c, e, g):
        """Return the read-out (N, D) and its gradients to z and c."""
        block = readout.BLOCK if self.block is None else dict.fromkeys(readout.BLOCK, self.block)
        z, c = z.detach().requires_grad_(), c.detach().requires_grad_()
        with mock.patch.multiple(readout, WHOLE=self.whole, BLOCK=block):
            u = self.function(z, c, e)
            return u.detach(), *torch.autograd.grad(u, [z, c], g)


MATRIX = Read(library, whole=2**60)
READS = {
    "blocks": Read(library),
    "matrix": MATRIX,
    "attention, E by 256 columns": Read(attention_by_256),
    "attention, zeros": Read(attention),
}
# block sizes that are also measured on a GPU
SIZES = {f"blocks of 2^{power}": Read(library, block=2**power) for power in (21, 23, 25, 27)}


def _send_memory(pipe, read, shape):
    """Send the rise of this process's peak memory through a pipe, after a small first read-out."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    tensors = inputs(*shape, cpu)
    read(*inputs(8, 8, 8, cpu))
    pipe.send(memory_rise(lambda: read(*tensors), cpu)[0])


def memory(read, shape, device):
    """Return the rise of the peak memory in MiB.

    On a CPU it is measured in a separate process, and is nan if that is killed or takes too long.
    """
    if device.type == "cuda":
        tensors = inputs(*shape, device)
        return memory_rise(lambda: read(*tensors), device)[0]
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_send_memory, args=(sender, read, shape)
    )
    process.start()
    sender.close()
    try:
        rise = receiver.recv() if receiver.poll(LIMIT) else float("nan")
    except EOFError:
        rise = float("nan")
    process.kill()
    process.join()
    return rise


def error(read, shape, device):
    """Return the largest error of the read-out and its gradients on 512 rows, relative to the
    largest entry.
    """
    tensors = inputs(512, *shape[1:], device)
    read = (
        read._replace(block=128 * shape[1])
        if read.function is library and read is not MATRIX
        else read
    )
    exact = MATRIX(*(x.double() for x in tensors))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(read(*tensors), exact))


def needs(name, count, size, width):
    """Return the bytes that a read-out needs besides its inputs.

    The matrix read-out holds A, A / tau, pi and two gradients of that size.
    """
    return 4 * (5 * count * size if name == "matrix" else 2 * count * width + size * width)


def free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure(shape, repeats, device, precision):
    """Measure every read-out of one shape that fits into memory; returns one row for each."""
    count, size, width = shape
    reads = READS | (SIZES if device.type == "cuda" else {})
    names = [
        name for name in reads if count * size <= ATTENTION or not name.startswith("attention")
    ]
    about = dict(
        count=count,
        codes=size,
        width=width,
        device=str(device),
        card=card(device),
        precision=precision,
    )
    rows = {name: about | dict(read=name, note="") for name in names}
    times = {}
    for name in names:
        if needs(name, *shape) > 0.7 * free_memory(device):
            rows[name]["note"] = f"not measured: needs {needs(name, *shape) / 2**30:.0f} GiB"
            continue
        rows[name]["peak_mib"] = memory(reads[name], shape, device)
        rows[name]["error"] = error(reads[name], shape, device)
        times[name] = []
    tensors = inputs(*shape, device)
    for turn in range(repeats):
        for name, read_times in times.items():  # alternately
            if turn == 0 or not name.startswith("attention"):  # attention is timed only once
                read_times += seconds(lambda: reads[name](*tensors), device, 1)  # noqa: B023
    typical = min if device.type == "cpu" else statistics.median
    for name, read_times in times.items():
        rows[name]["seconds"] = typical(read_times)
        if "matrix" in times:
            rows[name]["of_matrix_time"] = typical(read_times) / typical(times["matrix"])
            rows[name]["of_matrix_memory"] = rows[name]["peak_mib"] / rows["matrix"]["peak_mib"]
    for row in rows.values():
        print(
            "  ".join(
                f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
            ),
            flush=True,
        )
    return list(rows.values())


def shapes_of(options):
    """Return the shapes (N, K, D) to measure."""
    if options.quick:
        return [(8192, 1024, 64)]
    if options.device.type == "cuda":
        return [(n, 16384, d) for n in (8192, 65536) for d in (768, 1024)]
    return [(n, k, d) for n in (2048, 8192, 65536) for k in (1024, 16384) for d in (768, 1024)]


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small shape, to check that the benchmark runs (under 30 s)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.device = open_device(options.device)
    rows = []
    for precision in ("float32", "bf16") if options.device.type == "cuda" else ("float32",):
        open_device(str(options.device), precision)
        for shape in shapes_of(options):
            # fewer repeats for large shapes: `elements` limits the elements of A over all repeats
            max_repeats, elements = (10, 2**32) if options.device.type == "cuda" else (4, 2**28)
            repeats = max(1, min(max_repeats, elements // (shape[0] * shape[1])))
            rows += measure(shape, repeats, options.device, precision)
    table = pd.DataFrame(rows).drop(columns="note").assign(note=[row["note"] for row in rows])
    table.to_csv(options.out, index=False, float_format="%.4g")
    print(
        f"\n{options.out}: {len(table)} rows; {card(options.device)}, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
