"""What streaming the soft read-out costs and saves: seconds, peak memory and error beside the
matrix, and beside attention.

`python benchmarks/readout.py [--quick] [--device cuda]` runs softmax(A / tau) E forward and
backward (to latents and codes, E frozen, as in training) by blocks of rows and through the (N, K)
matrix, in turn in one process on one core; the least of the repeats counts, and on a GPU their
median. The library takes the matrix up to gear.tokenizer.readout.WHOLE elements; here the blocks
are measured on all shapes. Peak memory is that above what its inputs take, on a CPU in a process of
its own. The error is the largest of the read-out and its gradients against float64, over the
largest entry: on 512 rows, in four blocks. It prints a table and writes benchmarks/readout.csv.
What does not fit is listed as not measured.

On a GPU blocks of other sizes are measured beside the one that is shipped, and everything in both
precisions of a run: only in "bf16" may a product be TF32.

Why blocks and not scaled_dot_product_attention, whose queries, keys and values have one width,
where the code's is 8 and E's about 1,000? Latents and codes can be filled up with zeros, or E taken
by groups of columns, each with the softmax anew: both are measured on the shapes that are quick
enough. At these widths both take longer than the blocks; at 64 (--quick) zeros win.
"""

import argparse
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

import pandas as pd
import torch
import torch.nn.functional as F
from measure import card, memory_rise, seconds

from gear.device import open_device
from gear.tokenizer import readout
from gear.tokenizer.readout import Affinity

DIM, TAU = 8, 0.1  # of a code; the paper's
LIMIT = 300  # seconds a measurement of memory may take
OUT = Path(__file__).with_suffix(".csv")
ATTENTION = 2**25  # elements of A up to which attention is measured too


def inputs(count, size, width, device):
    """Unit latents and codes, a table E, and the gradient that reaches the read-out."""
    rng = torch.Generator(device).manual_seed(0)
    shapes = (count, DIM), (size, DIM), (size, width), (count, width)
    z, c, e, g = (torch.randn(shape, generator=rng, device=device) for shape in shapes)
    return [F.normalize(z, dim=-1), F.normalize(c, dim=-1), e, g]


def library(z, c, e):
    return Affinity(z, c, 2.0, -2.0).soft_readout(e, TAU)


def attention(z, c, e, width=None):
    """All of E at once, or by groups of `width` columns."""
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
    """A way to read out: the function, and what stands in for gear.tokenizer.readout's WHOLE and,
    unless None, BLOCK.
    """

    function: object
    whole: int = 0
    block: int | None = None

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
# measured on a GPU
SIZES = {f"blocks of 2^{power}": Read(library, block=2**power) for power in (21, 23, 25, 27)}


def _inside(pipe, read, shape):
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    tensors = inputs(*shape, cpu)
    read(*inputs(8, 8, 8, cpu))
    pipe.send(memory_rise(lambda: read(*tensors), cpu)[0])


def memory(read, shape, device):
    """Return by how many MiB the peak rises: on a CPU in a process of its own, nan where that is
    killed or too slow.
    """
    if device.type == "cuda":
        tensors = inputs(*shape, device)
        return memory_rise(lambda: read(*tensors), device)[0]
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_inside, args=(there, read, shape)
    )
    process.start()
    there.close()
    try:
        rise = here.recv() if here.poll(LIMIT) else float("nan")
    except EOFError:
        rise = float("nan")
    process.kill()
    process.join()
    return rise


def error(read, shape, device):
    """Return the largest error relative to the largest entry, of the read-out and its gradients, on
    512 rows.
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
    """Return the bytes a read-out takes above its inputs: of the matrix A, A / tau, pi and two
    gradients of them.
    """
    return 4 * (5 * count * size if name == "matrix" else 2 * count * width + size * width)


def free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure(shape, repeats, device, precision):
    """Measure every read-out of one shape that fits; returns a row of each."""
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
        for name, taken in times.items():  # in turn
            if turn == 0 or not name.startswith("attention"):  # of attention once will do
                taken += seconds(lambda: reads[name](*tensors), device, 1)  # noqa: B023
    typical = min if device.type == "cpu" else statistics.median
    for name, taken in times.items():
        rows[name]["seconds"] = typical(taken)
        if "matrix" in times:
            rows[name]["of_matrix_time"] = typical(taken) / typical(times["matrix"])
            rows[name]["of_matrix_memory"] = rows[name]["peak_mib"] / rows["matrix"]["peak_mib"]
    for row in rows.values():
        print(
            "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()),
            flush=True,
        )
    return list(rows.values())


def shapes_of(options):
    """Return the (N, K, D) that are measured."""
    if options.quick:
        return [(8192, 1024, 64)]
    if options.device.type == "cuda":
        return [(n, 16384, d) for n in (8192, 65536) for d in (768, 1024)]
    return [(n, k, d) for n in (2048, 8192, 65536) for k in (1024, 16384) for d in (768, 1024)]


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="one small shape: under 30 s, to see that it runs"
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
            # of A, all repeats together
            most, elements = (10, 2**32) if options.device.type == "cuda" else (4, 2**28)
            repeats = max(1, min(most, elements // (shape[0] * shape[1])))
            rows += measure(shape, repeats, options.device, precision)
    table = pd.DataFrame(rows).drop(columns="note").assign(note=[row["note"] for row in rows])
    table.to_csv(options.out, index=False, float_format="%.4g")
    print(
        f"\n{options.out}: {len(table)} rows; {card(options.device)}, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
