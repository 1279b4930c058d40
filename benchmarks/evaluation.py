"""Measure the evaluation against other libraries: images/s of feature extraction, seconds and peak
memory of each statistic.

`python benchmarks/evaluation.py [--quick] [--counts 10000 50000] [--dims 1280 2048] [--device
cuda]` gives every library the same random features. Each measurement runs in a separate process;
the libraries alternate, and the minimum of the repeats counts. The script prints a table and writes
benchmarks/evaluation.csv. prdc is measured if it is installed. Each of its matrices of all pairs
takes 8 N^2 bytes, so that 50,000 samples need more memory than most machines have; a measurement
that does not fit into memory is listed as not measured. On a GPU only gear's functions are
measured, in this process.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear  # noqa: F401  before torch, whose libraries read variables that gear sets

# isort: split

import pandas as pd
import torch
from measure import card, memory_rise, seconds, wait

from gear.device import open_device

LIMIT = 600  # seconds that a measurement may take
OUT = Path(__file__).with_suffix(".csv")


@functools.cache
def features(count, dim):
    """Return two seeded, non-negative sets of features with a few strong and many weak directions,
    as a network's features have.
    """
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(64, dim, generator=rng) / 8
    draw = lambda shift: (
        torch.randn(count, 64, generator=rng) @ mix
        + 0.3 * torch.randn(count, dim, generator=rng)
        + shift
    )
    return draw(0.5).relu_(), draw(0.45).relu_()


# -- the statistics: functions of (fake, real), each of which imports its own library


def our_moments(fake, real):
    from gear.measures.frechet import Moments

    return [_stream(Moments(rows.shape[1]), rows) for rows in (fake, real)]


def _stream(moments, rows):
    for chunk in rows.split(64):
        moments.update(chunk)
    return moments.mean, moments.covariance


def our_fd(fake, real):
    from gear.measures.frechet import frechet_distance

    return frechet_distance(*our_moments(fake, real))


def fidelity_fd(fake, real):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(rows) for rows in (fake, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def our_kid(fake, real):
    from gear.measures.neighbours import polynomial_mmd

    return polynomial_mmd(real, fake, 100, min(1_000, len(fake)), seed=2020)[0]


def fidelity_kid(fake, real, exact=False):
    from torch_fidelity.metric_kid import kid_features_to_metric

    sets = [rows.double() if exact else rows for rows in (fake, real)]
    size = min(1_000, len(fake))
    metrics = kid_features_to_metric(
        *sets, kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    return metrics["kernel_inception_distance_mean"]


def our_precision_recall(fake, real, half=False):
    from gear.measures.neighbours import precision_recall

    return precision_recall(real, fake, 3, half)[0]


def fidelity_precision_recall(fake, real):
    from torch_fidelity.metric_prc import prc_features_to_metric

    keywords = dict(prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False)
    return prc_features_to_metric(fake, real, **keywords)["precision"]


def our_prdc(fake, real):
    from gear.measures.neighbours import prdc

    return prdc(real, fake, 5)["density"]


def prdc_prdc(fake, real):
    from prdc import prdc as library

    library.sklearn.metrics.pairwise_distances = functools.partial(
        one_job, library.sklearn.metrics.pairwise_distances
    )
    with contextlib.redirect_stdout(None):
        return library.compute_prdc(real.numpy(), fake.numpy(), 5)["density"]


def one_job(function, *arguments, n_jobs=None, **keywords):
    """Run a function of scikit-learn on one core; prdc would use eight, all others use one."""
    return function(*arguments, n_jobs=1, **keywords)


def our_score(fake, real):
    from gear.measures.frechet import InceptionScore

    return InceptionScore(len(fake) // 10).update(fake[:, :1008]).value()


def fidelity_score(fake, real):
    from torch_fidelity.metric_isc import isc_features_to_metric

    return isc_features_to_metric(fake[:, :1008], 10, shuffle=False)["inception_score_mean"]


STATISTICS = {  # {statistic: {library: function}}
    "moments, streamed in 64s": {"gear": lambda *sets: our_moments(*sets)[0][0].mean().item()},
    "Frechet distance": {"gear": our_fd, "torch-fidelity": fidelity_fd},
    "Inception Score": {"gear": our_score, "torch-fidelity": fidelity_score},
    "KID, 100 x 1,000, float64": {
        "gear": our_kid,
        "torch-fidelity": functools.partial(fidelity_kid, exact=True),
    },
    "KID, 100 x 1,000, float32": {"torch-fidelity": fidelity_kid},
    "precision, recall, float32": {
        "gear": our_precision_recall,
        "torch-fidelity": fidelity_precision_recall,
    },
    "precision, recall, float16": {"gear": functools.partial(our_precision_recall, half=True)},
    "prdc, float64": {"gear": our_prdc, "prdc": prdc_prdc},
}


# -- measurement -----------------------------------------------------------------------------------


def _send_measurement(pipe, function, count, dim):
    """Send (seconds, value, MiB) through a pipe; MiB is the rise of the peak memory above that of
    the features. Runs in a separate process.
    """
    torch.set_num_threads(1)
    try:
        sets = features(count, dim)
        peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        value = function(*sets)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds, float(value), (peak - peak_before) / 1024))
    except ImportError as error:
        pipe.send(f"not measured: {error.name} is not installed")
    except MemoryError:
        pipe.send("not measured: out of memory")


def measure_here(function, sets, device):
    """Return (seconds, value, MiB) of the second of two calls on a GPU, or a note why there is no
    value.
    """
    values = []
    try:
        times = seconds(lambda: values.append(float(function(*sets))), device, 2)
        return times[1], values[1], memory_rise(lambda: function(*sets), device)[0]
    except torch.OutOfMemoryError:
        return "not measured: out of memory"


def measure(function, count, dim):
    """Return (seconds, value, MiB), measured in a separate process, or a note why there is no
    value.
    """
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_send_measurement, args=(sender, function, count, dim)
    )
    process.start()
    sender.close()
    result = f"not measured: above {LIMIT} s"
    try:
        if receiver.poll(LIMIT):
            result = receiver.recv()
    except EOFError:
        result = "not measured: the process was killed (memory)"
    process.kill()
    process.join()
    return result


def needs(statistic, library, count, dim):
    """Return the bytes that a measurement is known to need; some libraries hold all pairs at
    once.
    """
    if library == "prdc":
        return 3 * 8 * count**2  # real-real, fake-fake, and a copy that is partitioned
    if library == "torch-fidelity" and statistic.startswith("precision"):
        return 3 * 4 * min(count, 10_000) * count
    return 8 * 4 * count * dim if "KID" in statistic else 0


def free_memory():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def statistics(counts, dims, repeats, only, device):
    rows = []
    for count in counts:
        for dim in dims:
            # computed once here, because the forked processes inherit it
            sets = [both.to(device) for both in features(count, dim)]
            for statistic, libraries in STATISTICS.items():
                if only and not any(word in statistic for word in only):
                    continue
                if device.type == "cuda":
                    libraries = {"gear": libraries["gear"]} if "gear" in libraries else {}
                runs = {library: [] for library in libraries}
                for _ in range(repeats):
                    for library, function in libraries.items():  # alternately
                        needed = needs(statistic, library, count, dim)
                        if device.type == "cuda":
                            result = measure_here(function, sets, device)
                        elif needed > 0.8 * free_memory():
                            result = f"not measured: needs {needed / 2**30:.0f} GiB"
                        else:
                            result = measure(function, count, dim)
                        runs[library].append(result)
                rows += _rows(statistic, count, dim, runs)
                for row in rows[-len(runs) :]:
                    print(_line(row), flush=True)
            features.cache_clear()
    return rows


def _rows(statistic, count, dim, runs):
    rows = []
    for library, results in runs.items():
        row = dict(what=statistic, library=library, count=count, dim=dim)
        measured = [result for result in results if isinstance(result, tuple)]
        if measured:
            row |= dict(
                seconds=min(seconds for seconds, _, _ in measured),
                value=measured[0][1],
                peak_mib=max(rise for _, _, rise in measured),
                note="",
            )
        else:
            row |= dict(note=results[0])
        rows.append(row)
    our_seconds = next(
        (row["seconds"] for row in rows if row["library"] == "gear" and "seconds" in row), None
    )
    for row in rows:
        if our_seconds and "seconds" in row and row["library"] != "gear":
            row["times_ours"] = row["seconds"] / our_seconds
    return rows


def _line(row):
    if "seconds" not in row and "images_s" not in row:
        return (
            f"{row['what']:28} {row['library']:15} {row.get('count', 0):7,} x "
            f"{row.get('dim', 0):5} "
            f"{row['note']}"
        )
    if "images_s" in row:
        return f"{row['what']:28} {row['library']:15} {row['images_s']:8.1f} images/s"
    ratio = f"{row['times_ours']:6.2f} x ours" if "times_ours" in row else " " * 13
    return (
        f"{row['what']:28} {row['library']:15} {row['count']:7,} x {row['dim']:5} "
        f"{row['seconds']:9.2f} s {ratio} "
        f"+{row['peak_mib']:8.0f} MiB  {row['value']:.8g}"
    )


def extraction(images, side, device):
    """Return rows with the images/s of each feature network, in batches of 64, on a GPU or on one
    core; a network whose weights are not on this machine is not measured.
    """
    from gear.config import UserError
    from gear.evaluation.networks import NETWORKS, load_network_by_name

    torch.set_num_threads(1)
    rows = []
    batch = torch.randint(0, 256, (min(64, images), side, side, 3), dtype=torch.uint8)
    for name in NETWORKS:
        row = dict(what=f"features of {side} px images", library=name)
        try:
            network = load_network_by_name(name, offline=True).to(device)
            network(batch[:2].to(device))
            wait(device)
            start = time.perf_counter()
            num_seen = 0
            while num_seen < images:
                network(batch.to(device))
                num_seen += len(batch)
            wait(device)
            row |= dict(count=num_seen, images_s=num_seen / (time.perf_counter() - start), note="")
        except (UserError, ImportError) as error:
            row |= dict(note=f"not measured: {str(error)[:70]}...")
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sets, to check that the benchmark runs (under 30 s)",
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[1280, 2048])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[], help="words in the names of the statistics to measure"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    device = open_device(options.device)
    if options.quick:
        options.counts = [1_000]
        options.dims = [256]
        options.repeats = 1
    import torch_fidelity  # noqa: F401  imported here, so that no measurement includes the import
    import torch_fidelity.metric_fid  # noqa: E401, F401, I001

    rows = extraction(64 if options.quick else 256, 32, device) if not options.only else []
    rows += statistics(options.counts, options.dims, options.repeats, options.only, device)
    table = pd.DataFrame(rows).assign(device=str(device), card=card(device))
    table.to_csv(options.out, index=False, float_format="%.6g")
    missing = int((table["note"] != "").sum())
    print(
        f"\n{options.out}: {len(table)} rows, {missing} not measured; {card(device)}, load "
        f"{os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
