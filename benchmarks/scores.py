"""Score and analyse the finished runs in $GEAR_RUNS: one process per run, eight at a time.

`python benchmarks/scores.py [--quick] [--device cuda]` writes metrics.json and analysis/ of every
finished generator run: the scores of its samples and reconstructions, the alignment profiles of its
layers and of its tokenizer, the tests of its layers against chance, and the floors of its
alignment.
"""

import argparse
import multiprocessing
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gear

# isort: split

from gear.analysis.calibration import layer_calibration
from gear.analysis.profiles import alignment_floors, layer_profile, tokenizer_profile
from gear.evaluation.evaluate import EvaluateOptions, Sampling, evaluate_run

JOBS = 8


def score(name, device, quick):
    """Score and analyse one run; the results are written to its folder. Returns its name."""
    run = gear.Run.open(name)
    images = 40 if quick else 1_000
    few = dict(sampling=Sampling(count=64), reference_count=100) if quick else {}
    evaluate_run(name, EvaluateOptions(**few, both=True, device=device, quiet=True))
    tables = [(tokenizer_profile, dict(images=images, k=5 if quick else 10))]
    tables.append((layer_profile, tables[0][1]))
    tables.append((layer_calibration, tables[0][1]))
    tables.append((alignment_floors, dict(per_class=100)))
    for table, sizes in tables:
        table(run, device=device, **sizes)
    return name


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument(
        "--quick", action="store_true", help="few images, to check that the script runs"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    finished = [
        run for run in gear.open_runs("*") if run.is_finished and run.config["stage"] == "generator"
    ]
    if not finished:
        print("no run is finished: there is nothing to score")
        sys.exit(1)
    jobs = min(JOBS, os.cpu_count(), len(finished))
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        pending = [
            pool.apply_async(score, (run.name, options.device, options.quick)) for run in finished
        ]
        for result in pending:
            print(f"scored: {result.get()}", flush=True)


if __name__ == "__main__":
    main()
