"""What streaming the soft read-out costs and saves: seconds, peak memory and error beside the matrix, and beside attention.

`python benchmarks/readout.py [--quick]` runs softmax(A / tau) E forward and backward (to latents and codes, E frozen, as in
training) by blocks of rows and through the (N, K) matrix, in turn in one process on one core; the least of the repeats counts.
The library takes the matrix up to gear.tokenizer.readout.WHOLE elements; here the blocks are measured on all shapes.
Peak memory is that of a process of its own, above what its inputs and torch's start take. The error is the largest of the
read-out and its gradients against float64, over the largest entry: on 512 rows, in four blocks. It prints a table and writes
benchmarks/readout.csv. What does not fit is listed as not measured.

Why blocks and not scaled_dot_product_attention, whose queries, keys and values have one width, where the code's is 8 and E's
about 1,000? Latents and codes can be filled up with zeros, or E taken by groups of columns, each with the softmax anew: both
are measured on the shapes that are quick enough. At these widths both take longer than the blocks; at 64 (--quick) zeros win.
"""

import argparse
import functools
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

import pandas as pd
import torch
import torch.nn.functional as F

from gear.tokenizer import readout
from gear.tokenizer.readout import Affinity, soft_readout

DIM, TAU, LIMIT = 8, 0.1, 300  # of a code; the paper's; seconds a measurement of memory may take
OUT, BLOCK = Path(__file__).with_suffix(".csv"), readout.BLOCK
ATTENTION = 2**25  # elements of A up to which attention is measured too


def inputs(count, size, width, dtype=torch.float32):
    """Unit latents and codes, a table E, and the gradient that reaches the read-out."""
    rng = torch.Generator().manual_seed(0)
    z, c = (F.normalize(torch.randn(n, DIM, generator=rng), dim=-1) for n in (count, size))
    e, g = torch.randn(size, width, generator=rng), torch.randn(count, width, generator=rng)
    return [x.to(dtype) for x in (z, c, e, g)]


def run(read, z, c, e, g):
    z, c = z.detach().requires_grad_(), c.detach().requires_grad_()
    u = read(z, c, e)
    return u.detach(), *torch.autograd.grad(u, [z, c], g)


def blocks(z, c, e, block=BLOCK):
    readout.WHOLE, readout.BLOCK = 0, block
    return soft_readout(Affinity(z, c, 2.0, -2.0), e, TAU)


def matrix(z, c, e):
    readout.WHOLE = 2**60
    return soft_readout(Affinity(z, c, 2.0, -2.0), e, TAU)


def attention(z, c, e, width=None):
    """All of E at once, or by groups of `width` columns."""
    width = width or e.shape[1]
    q, k = (F.pad(x, (0, width - DIM))[None, None] for x in (z, c))
    groups = [F.scaled_dot_product_attention(q, k, v[None, None], scale=2 / TAU) for v in e.split(width, 1)]
    return torch.cat(groups, -1)[0, 0]


def attention_by_256(z, c, e):
    return attention(z, c, e, 256)


READS = {"blocks": blocks, "matrix": matrix, "attention, E by 256 columns": attention_by_256, "attention, zeros": attention}


def _inside(pipe, read, shape):
    torch.set_num_threads(1)
    tensors = inputs(*shape)
    run(read, *inputs(8, 8, 8))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; getrusage's is the parent's where that is higher
    before = _peak()
    run(read, *tensors)
    pipe.send(_peak() - before)


def _peak():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def memory(read, shape):
    """Return by how many MiB the peak rises in a process of its own, or nan where it is killed or too slow."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_inside, args=(there, read, shape))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(LIMIT) else float("nan")
    except EOFError:
        found = float("nan")
    process.kill()
    process.join()
    return found


def error(read, shape):
    """Return the largest error relative to the largest entry, of the read-out and its gradients, on 512 rows."""
    tensors = inputs(512, *shape[1:])
    read = functools.partial(blocks, block=128 * shape[1]) if read is blocks else read
    exact = run(matrix, *(x.double() for x in tensors))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(run(read, *tensors), exact))


def needs(name, count, size, width):
    """Return the bytes a read-out takes above its inputs: of the matrix A, A / tau, pi and two gradients of them."""
    return 4 * (5 * count * size if name == "matrix" else 2 * count * width + size * width)


def free_memory():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure(shape, repeats):
    """Measure every read-out of one shape that fits; returns a row of each."""
    count, size, width = shape
    names = [name for name in READS if count * size <= ATTENTION or not name.startswith("attention")]
    rows = {name: dict(count=count, codes=size, width=width, read=name, note="") for name in names}
    taken = {}
    for name in names:
        if needs(name, *shape) > 0.7 * free_memory():
            rows[name]["note"] = f"not measured: needs {needs(name, *shape) / 2**30:.0f} GiB"
            continue
        rows[name]["peak_mib"] = memory(READS[name], shape)
        rows[name]["error"] = error(READS[name], shape)
        taken[name] = []
    tensors = inputs(*shape)
    for turn in range(repeats):
        for name, seconds in taken.items():  # in turn
            if turn and name.startswith("attention"):
                continue  # once will do
            start = time.perf_counter()
            run(READS[name], *tensors)
            seconds.append(time.perf_counter() - start)
    for name, seconds in taken.items():
        rows[name]["seconds"] = min(seconds)
        if "matrix" in taken:
            rows[name]["of_matrix_time"] = min(seconds) / min(taken["matrix"])
            rows[name]["of_matrix_memory"] = rows[name]["peak_mib"] / rows["matrix"]["peak_mib"]
    for row in rows.values():
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape: under 30 s, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(n, k, d) for n in (2048, 8192, 65536) for k in (1024, 16384) for d in (768, 1024)]
    rows = []
    for shape in [(8192, 1024, 64)] if options.quick else shapes:
        rows += measure(shape, max(1, min(4, 2**28 // (shape[0] * shape[1]))))
    table = pd.DataFrame(rows).drop(columns="note").assign(note=[row["note"] for row in rows])
    table.to_csv(options.out, index=False, float_format="%.4g")
    print(f"\n{options.out}: {len(table)} rows; one core, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
