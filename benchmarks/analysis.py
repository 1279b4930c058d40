"""Measure the alignment metrics: seconds and peak memory beyond the inputs, compared with direct
implementations of their definitions.

`python benchmarks/analysis.py [--quick] [--device cuda]` measures gear.measures.alignment on
float32 inputs, and the direct forms below, which are dense and use loops: centring matrices,
n x n masks, every term from matrix products, O(n^3). Each measurement runs in a separate process
with two threads; the two forms of a size run one after the other. The script prints a table and
writes benchmarks/analysis.csv. A size for which the direct form takes too long is listed as not
measured.

`seconds` is elapsed time, `cpu_seconds` the CPU time of both threads. If other programs use the
cores (`load` is the average of the last minute), `seconds` is an upper bound, and half of
`cpu_seconds` is closer to the time on an idle machine. `times_ours` is a ratio of `cpu_seconds`.
`difference` is the difference between the two forms' values. On a GPU only `seconds` count, and the
second call is timed, because the first one includes the set-up of libraries.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import pandas as pd
import torch
from measure import card, memory_rise, wait

from gear.device import open_device
from gear.measures.alignment import cka, cknna, null, within_image

THREADS = 2
K = 10  # neighbours of CKNNA and mutual k-NN
DRAWS = 20  # permutations of a null
LIMIT = 300  # seconds that a measurement may take
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "what form size device card seconds cpu_seconds peak_mib times_ours difference value load note"
).split()


# -- direct implementations of the definitions -----------------------------------------------------


def kernels(x, y):
    return [z.double() @ z.double().T for z in (x, y)]


def mask(kernel, k=K):
    """Return the n x n matrix that is one where column j is among the k nearest of row i."""
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k).indices
    return torch.zeros_like(kernel).scatter(1, nearest, 1)


def hsic(p, q):
    """Song et al. 2012, Eq. 5, without its factor."""
    product, n = p @ q, len(p)
    return product.trace() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * product.sum() / (n - 2)


def direct_cknna(x, y):
    p, q = kernels(x, y)
    mask_p = mask(p)
    mask_q = mask(q)
    both = mask_p * mask_q
    hsic_pp = hsic(mask_p * p, mask_p * p)
    hsic_qq = hsic(mask_q * q, mask_q * q)
    return float(hsic(both * p, both * q) / (hsic_pp * hsic_qq).sqrt())


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
    alignment = within_image(x, y, K)
    mean = lambda *values: torch.stack(values).mean().item()
    return mean(alignment.cknna, alignment.cka, alignment.mutual_knn) - mean(
        alignment.null_cknna, alignment.null_cka, alignment.null_mutual_knn
    )


def direct_null(metric):
    return lambda x, y: null(x, y, lambda x, y: metric(x, y), DRAWS).std


FORMS = {  # {metric: (gear's form, direct form, largest count for the direct form)}
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


# -- measurement -----------------------------------------------------------------------------------


def inputs(shape, device):
    """Return two float32 representations; half of the second's variance comes from the first."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=rng) for _ in range(2))
    return x.to(device), y.add_(x).to(device)


def _measure(metric, ours, shape, device):
    function = FORMS[metric][0 if ours else 1]
    pair = inputs(shape, device)
    small_pair = inputs((4, 16, 8) if len(shape) == 3 else (40, 8), device)
    # a first call that is not measured, in which torch sets up its libraries
    function(*(pair if device.type == "cuda" else small_pair))
    result = {}

    def measured_call():
        start = time.perf_counter()
        cpu_start = time.process_time()
        result["value"] = function(*pair)
        wait(device)
        result["seconds"] = time.perf_counter() - start
        result["cpu_seconds"] = time.process_time() - cpu_start

    rise, _ = memory_rise(measured_call, device)
    return result | dict(peak_mib=rise, note="")


def _send_measurement(pipe, *arguments):
    torch.set_num_threads(THREADS)
    pipe.send(_measure(*arguments))


def measure(metric, ours, shape, device):
    """Return the columns of a measurement, or a note that says why there is none.

    On a CPU the measurement runs in a separate process.
    """
    if not ours and shape[0] > FORMS[metric][2]:
        return dict(note="not measured: too long")
    if device.type == "cuda":
        return _measure(metric, ours, shape, device)
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_send_measurement, args=(sender, metric, ours, shape, device)
    )
    process.start()
    sender.close()
    result = dict(note=f"not measured: above {LIMIT} s")
    try:
        if receiver.poll(LIMIT):
            result = receiver.recv()
    except EOFError:
        result = dict(note="not measured: the process was killed (memory)")
    process.kill()
    process.join()
    return result


def metrics_and_shapes(quick, device):
    """Return the (metric, shape) to measure; on a GPU only the largest shape of each metric."""
    largest = dict(SIZES) if device.type == "cuda" else {}
    return QUICK if quick else list(largest.items()) or SIZES


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small size of each, to check that the benchmark runs (under a minute)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    device = open_device(options.device)
    for metric, shape in metrics_and_shapes(options.quick, device):
        pair = [
            dict(what=metric, form=form, size="x".join(map(str, shape)))
            for form in ("gear", "direct")
        ]
        for ours, row in zip((True, False), pair):
            row |= dict(device=str(device), card=card(device))
            row |= measure(metric, ours, shape, device) | dict(load=os.getloadavg()[0])
        if "value" in pair[0] and "value" in pair[1]:
            clock = "cpu_seconds" if device.type == "cpu" else "seconds"
            pair[1] |= dict(
                times_ours=pair[1][clock] / pair[0][clock],
                difference=abs(pair[1]["value"] - pair[0]["value"]),
            )
        for row in pair:
            print(
                "  ".join(
                    f"{value:.4g}" if isinstance(value, float) else str(value)
                    for value in row.values()
                ),
                flush=True,
            )
        rows += pair
        pd.DataFrame(rows, columns=COLUMNS).to_csv(options.out, index=False, float_format="%.4g")
    print(
        f"\n{options.out}: {len(rows)} rows; two threads, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    print("If the load was above zero, `seconds` are upper bounds.")


if __name__ == "__main__":
    main()
