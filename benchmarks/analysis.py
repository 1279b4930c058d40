"""How fast the alignments are: seconds and peak memory beyond the inputs, ours beside the
definitions written out.

`python benchmarks/analysis.py [--quick] [--device cuda]` measures gear.measures.alignment on
float32 inputs beside the textbook forms below, dense and in loops: centring matrices, n x n masks,
every term from matrix products, O(n^3). Each measurement is a process of its own with two threads,
the two forms of a size one after the other. It prints a table and writes benchmarks/analysis.csv.
What takes the direct form too long is listed as not measured. `seconds` go by the clock,
`cpu_seconds` are what both threads worked together: where other programs take their turns on the
cores (`load`, of the last minute), seconds are an upper bound, and half the cpu_seconds come nearer
to what an idle machine takes; `times_ours` is of cpu_seconds. `difference` is that of the two
forms' values. On a GPU `seconds` count alone, and a second call is timed: the first one pays for
libraries.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gear  # noqa: F401  before torch: it sets what torch's libraries read when they load

# isort: split

import pandas as pd
import torch
from measure import card, memory_rise, wait

from gear.device import open_device
from gear.measures.alignment import cka, cknna, null, within_image

THREADS, K, DRAWS, LIMIT = 2, 10, 20, 300  # LIMIT: seconds a measurement may take
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "what form size device card seconds cpu_seconds peak_mib times_ours difference value load note"
).split()


# -- the definitions, written out ------------------------------------------------------------------


def kernels(x, y):
    return [z.double() @ z.double().T for z in (x, y)]


def mask(kernel, k=K):
    """The n x n matrix with a one where column j is among the k nearest of row i."""
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k).indices
    return torch.zeros_like(kernel).scatter(1, nearest, 1)


def hsic(p, q):
    """Song et al. 2012, Eq. 5, without its factor."""
    product, n = p @ q, len(p)
    return product.trace() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * product.sum() / (n - 2)


def direct_cknna(x, y):
    p, q = kernels(x, y)
    of_p, of_q = mask(p), mask(q)
    both = of_p * of_q
    return float(
        hsic(both * p, both * q) / (hsic(of_p * p, of_p * p) * hsic(of_q * q, of_q * q)).sqrt()
    )


def direct_cka(x, y):
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    p, q = ((centring @ kernel @ centring).fill_diagonal_(0) for kernel in kernels(x, y))  # H K H
    return float(hsic(p, q) / (hsic(p, p) * hsic(q, q)).sqrt())


def direct_mutual(x, y):
    p, q = kernels(x, y)
    return float((mask(p) * mask(q)).sum(1).mean() / K)


def direct_within(x, y):
    values = [[f(a, b) for f in (direct_cknna, direct_cka, direct_mutual)] for a, b in zip(x, y)]
    chance = [
        [f(a, b) for f in (direct_cknna, direct_cka, direct_mutual)]
        for a, b in zip(x, y.roll(-1, 0))
    ]
    return torch.tensor(values).mean().item() - torch.tensor(chance).mean().item()


def our_within(x, y):
    found = within_image(x, y, K)
    mean = lambda *values: torch.stack(values).mean().item()
    return mean(found.cknna, found.cka, found.mutual_knn) - mean(
        found.null_cknna, found.null_cka, found.null_mutual_knn
    )


def direct_null(metric):
    return lambda x, y: null(x, y, lambda x, y: metric(x, y), DRAWS).std


FORMS = {  # {what: (ours, direct, largest count the direct form is given)}
    "within images: CKNNA, CKA, mutual k-NN and nulls": (our_within, direct_within, 100),
    "CKNNA": (cknna, direct_cknna, 4_000),
    "CKA": (cka, direct_cka, 2_000),
    f"null of CKNNA, {DRAWS} draws": (
        lambda x, y: null(x, y, cknna, DRAWS).std,
        direct_null(direct_cknna),
        1_000,
    ),
    f"null of CKA, {DRAWS} draws": (
        lambda x, y: null(x, y, cka, DRAWS).std,
        direct_null(direct_cka),
        1_000,
    ),
}
WITHIN = next(iter(FORMS))
SIZES = [(WITHIN, (n, 256, 1024)) for n in (10, 100, 1_000)]
SIZES += [(what, (n, 1024)) for what in ("CKNNA", "CKA") for n in (1_000, 2_000, 4_000, 10_000)]
SIZES += [(what, (n, 1024)) for what in list(FORMS)[3:] for n in (1_000, 10_000)]
QUICK = [(WITHIN, (10, 64, 128)), *((what, (300, 128)) for what in list(FORMS)[1:])]


# -- how it is measured ----------------------------------------------------------------------------


def inputs(shape, device):
    """Two float32 representations, half of the second's variance the first's."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=rng) for _ in range(2))
    return x.to(device), y.add_(x).to(device)


def _measure(what, ours, shape, device):
    function, sets, taken = FORMS[what][0 if ours else 1], inputs(shape, device), {}
    small = inputs((4, 16, 8) if len(shape) == 3 else (40, 8), device)
    function(*(sets if device.type == "cuda" else small))  # what torch's start takes is not counted

    def work():
        start, worked = time.perf_counter(), time.process_time()
        taken["value"] = function(*sets)
        wait(device)
        taken.update(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - worked)

    rise, _ = memory_rise(work, device)
    return taken | dict(peak_mib=rise, note="")


def _inside(pipe, *arguments):
    torch.set_num_threads(THREADS)
    pipe.send(_measure(*arguments))


def measure(what, ours, shape, device):
    """Return what was measured, on a CPU in a process of its own, or why nothing was."""
    if not ours and shape[0] > FORMS[what][2]:
        return dict(note="not measured: too long")
    if device.type == "cuda":
        return _measure(what, ours, shape, device)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_inside, args=(there, what, ours, shape, device)
    )
    process.start()
    there.close()
    found = dict(note=f"not measured: above {LIMIT} s")
    try:
        if here.poll(LIMIT):
            found = here.recv()
    except EOFError:
        found = dict(note="not measured: the process was killed (memory)")
    process.kill()
    process.join()
    return found


def chosen(quick, device):
    """Return the (what, shape) to measure: on a GPU the largest of each alone."""
    largest = dict(SIZES) if device.type == "cuda" else {}
    return QUICK if quick else list(largest.items()) or SIZES


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small size of each: under a minute, to see that it runs",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options, rows = parser.parse_args(), []
    device = open_device(options.device)
    for what, shape in chosen(options.quick, device):
        pair = [
            dict(what=what, form=form, size="x".join(map(str, shape)))
            for form in ("gear", "direct")
        ]
        for ours, row in zip((True, False), pair):
            row |= dict(device=str(device), card=card(device))
            row |= measure(what, ours, shape, device) | dict(load=os.getloadavg()[0])
        if "value" in pair[0] and "value" in pair[1]:
            clock = "cpu_seconds" if device.type == "cpu" else "seconds"
            pair[1] |= dict(
                times_ours=pair[1][clock] / pair[0][clock],
                difference=abs(pair[1]["value"] - pair[0]["value"]),
            )
        for row in pair:
            print(
                "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()),
                flush=True,
            )
        rows += pair
        pd.DataFrame(rows, columns=COLUMNS).to_csv(options.out, index=False, float_format="%.4g")
    print(
        f"\n{options.out}: {len(rows)} rows; two threads, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    print("Where the load was above zero, seconds are upper bounds.")


if __name__ == "__main__":
    main()
