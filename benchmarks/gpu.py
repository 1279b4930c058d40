"""Run everything that a short visit to a GPU should do: tests, peak rates, timings, memory, and
training until the deadline.

`make gpu`, or `python benchmarks/gpu.py [--deadline 590] [--out FOLDER] [--parts NAME ...]`. Each
part runs in a separate process with a time limit. Its exit code and seconds go to summary.csv, and
the next part runs even if it fails. A part for which less than half of its limit is left is
skipped, which summary.csv says. FOLDER (default: $OUT, or a new folder) gets eight small files.
They are written again after every part, so that they are complete up to that part if the visit is
killed. No part needs network access or an installed package of gear: all parts run with the Python
that runs this script, and wheels in `wheels/` beside the Makefile are installed first.

`--quick --device cpu` runs every part at its smallest size, to check that all of them work.
"""

import argparse
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
PACKING = 8  # seconds reserved for writing the last files
GRACE = 12  # seconds that a part has to save after it was asked to stop
LEAST = 20  # least seconds for which training is started
STOPPED = 124  # exit code of a part that was stopped at its limit, as in timeout(1)
SEEDS = range(3, 8)  # the repository's records have seeds 0 to 2
LARGE = "imagenet256-l-joint"  # the recipe that the goals refer to
METHODS = "joint-naive gear llamagen-repa llamagen-repa-control llamagen-repa-half".split()
FEW = "blocks or joint_step or cache or waits"  # the tests of a quick visit, for pytest -k
SUMMARY = ("part", "seconds", "limit", "exit", "note")
TRIAL = "`python benchmarks/gpu.py --quick --device cpu`"
TAIL = 11_000  # number of characters of the report's end that are printed
# files of a run that are packed, besides its last samples
KEPT = ("config.json", "metrics.jsonl", "timing.jsonl", "metrics.json", "analysis/*")


@dataclass(frozen=True)
class Part:
    """A part of the visit: commands that run one after another, and their total limit in seconds.

    A command runs even if an earlier one failed. `lasts` marks a part that uses all remaining time:
    stopping it is no failure.
    """

    name: str
    limit: float
    commands: list
    lasts: bool = False


def parts(options, out, work):
    """Return the Parts of a visit in order; the eight files go to `out`, all other files to
    `work`.
    """
    python = sys.executable
    device = options.device
    quick = ["--quick"] * options.quick
    tables = work / "tables"

    def bench(name, *words, table=None):
        """Return the command of a benchmark that writes to the folder of tables."""
        output = ["--device", device, "--out", str(tables / f"{table or name}.csv"), *quick]
        return [python, str(HERE / f"{name}.py"), *words, *output]

    wheels = sorted((ROOT / "wheels").glob("*.whl"))
    setup = []
    if wheels:
        install = "-m pip install --quiet --no-index --no-deps --target".split()
        setup = [[python, *install, str(work / "packages"), *map(str, wheels)]]
    setup.append([python, str(HERE / "environment.py"), "--out", str(out / "env.txt")])
    tests = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(work / "tests"),
    ]
    # tests of one device have names like test_x[cuda-...]
    selection = ["-k", f"[{device.partition(':')[0]}" + (f" and ({FEW})" if options.quick else "")]
    tests += [
        str(ROOT / "tests" / "training" / "test_cuda.py"),
        f"--junitxml={out / 'junit.xml'}",
        *selection,
    ]
    step = ["--random-weights"]
    step += ["--steps", "3" if options.quick else "8", "--batch", "0" if options.quick else "32"]
    main = "tiny-joint" if options.quick else LARGE
    others = (
        ["tiny-tokenizer"]
        if options.quick
        else ["scenes-joint", "cifar10-joint", "imagenet256-l-gear", "imagenet256-b-joint"]
    )
    train = [
        python,
        "-m",
        "gear",
        "train",
        "--device",
        device,
        "--jobs",
        "2" if options.quick else "8",
        "--keep",
        "1",
    ]
    runs = (
        ["tiny-llamagen-repa"]
        if options.quick
        else [f"scenes-{method}-s{seed}" for seed in SEEDS for method in METHODS]
    )
    return [
        Part("setup", 40, setup),
        Part("ceilings", 40, [bench("ceilings")]),
        Part("tests", 100, [tests]),
        Part("readout", 45, [bench("readout")]),
        Part("step", 170, [bench("step", *step, "--recipes", main)]),
        Part("kernels", 60, [bench("kernels", "--random-weights", "--recipe", main)]),
        Part("sampling", 60, [bench("sampling")]),
        Part("analysis", 30, [bench("analysis")]),
        Part("others", 90, [bench("step", *step, "--recipes", *others, table="others")]),
        Part(
            "largest", 60, [bench("step", *step, "--largest", "--recipes", main, table="largest")]
        ),
        Part("training", 240, [[*train[:4], *runs, *train[4:]]], lasts=True),
        Part("scores", 45, [[python, str(HERE / "scores.py"), "--device", device, *quick]]),
    ]


def environment(work):
    """Return the environment variables of every part: this repository's gear, and all caches inside
    `work`.
    """
    paths = [str(ROOT), str(work / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = {"GEAR_RUNS": "runs", "GEAR_FIGURES": "figures", "GEAR_CACHE": "cache"}
    names |= {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    folders = {name: str(work / folder) for name, folder in names.items()}
    fixed = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | folders | fixed


def run(part, limit, work):
    """Run a part's commands for at most `limit` seconds, with output to a log file; returns (exit
    code, note).

    The exit code is that of the first command that failed.
    """
    end = time.monotonic() + limit
    failure = (0, "")
    with open(work / "log" / f"{part.name}.txt", "w") as log:
        for command in part.commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=work,
                env=environment(work),
                start_new_session=True,
            )
            try:
                code = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return (0 if part.lasts else STOPPED), f"stopped after {limit:.3g} s"
            finally:
                stop(process)
            if code and not failure[0]:
                failure = code, f"exit code of: {' '.join(Path(word).name for word in command[:4])}"
    return failure


def stop(process):
    """End a process and all processes that it started: SIGTERM first, so that it can save, then
    SIGKILL.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(
            process.pid, signal.SIGKILL
        )  # only this process and its children are in the group
    except ProcessLookupError:
        pass
    process.wait()


def allowance(part, left, later):
    """Return the seconds that a part gets of the seconds `left`, or 0 if it is skipped.

    A part that lasts gets the time that the `later` parts do not need. Any other part gets up to
    its limit, and leaves a later part that lasts at least half of its limit.
    """
    usable = left - PACKING - GRACE
    if part.lasts:
        usable -= sum(later_part.limit for later_part in later)
        return usable if usable >= LEAST else 0
    usable -= sum(later_part.limit / 2 for later_part in later if later_part.lasts)
    return min(part.limit, usable) if usable >= part.limit / 2 else 0


def visit(options, out, work):
    """Run the parts one after another until the deadline; returns the rows of summary.csv."""
    deadline = time.monotonic() + options.deadline
    rows = []
    for folder in ("log", "tables", "runs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    selected = [
        part for part in parts(options, out, work) if part.name in (options.parts or [part.name])
    ]
    for i, part in enumerate(selected):
        start = time.monotonic()
        limit = allowance(part, deadline - start, selected[i + 1 :])
        if limit:
            code, note = run(part, limit, work)
        else:
            code = ""
            note = f"skipped: {max(0, deadline - start):.0f} s are left until the deadline"
        seconds = f"{time.monotonic() - start:.1f}"
        rows.append(dict(zip(SUMMARY, (part.name, seconds, f"{limit:.0f}", code, note))))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        pack(rows, out, work)
    return rows


# -- the eight files -------------------------------------------------------------------------------


def pack(rows, out, work):
    """Write the eight files with the results so far; the parts write env.txt and junit.xml
    themselves.
    """
    for name in ("env.txt", "junit.xml"):
        if not (out / name).exists():
            (out / name).write_text("")
    write_csv(rows, SUMMARY, out / "summary.csv")
    write_csv(goals(work / "tables"), ("goal", "threshold", "value", "card"), out / "goals.csv")
    archive(out / "tables.tgz", work / "tables", (work / "tables").glob("*.csv"))
    runs = list((work / "runs").glob("*/"))
    records = [file for run in runs for pattern in KEPT for file in run.glob(pattern)]
    last_samples = [max(run.glob("samples/*"), default=run) for run in runs]
    archive(out / "runs.tgz", work / "runs", [*records, *last_samples])
    archive(out / "log.tgz", work / "log", (work / "log").glob("*.txt"))
    (out / "report.txt").write_text(report(out, work))


def write_csv(rows, columns, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Return the rows of a CSV file as dicts of strings, or [] if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def archive(path, folder, files):
    """Write the paths of `files`, all inside `folder`, to a .tgz; paths that are no files are left
    out.
    """
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(file for file in files if file.is_file()):
            tar.add(file, file.relative_to(folder))


def report(out, work):
    """Return all tables as text, the shortest last, because a terminal shows the end."""
    files = [*sorted((work / "tables").glob("*.csv"), key=lambda path: -path.stat().st_size)]
    files += [out / "goals.csv", out / "summary.csv"]
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in files)


# -- the goals of a GPU ----------------------------------------------------------------------------


def goals(tables):
    """Return one row per goal: its threshold, and its value or, without a GPU's measurement,
    "not measured".
    """
    step, sampling = (read_csv(tables / f"{name}.csv") for name in ("step", "sampling"))
    readout = read_csv(tables / "readout.csv")
    large = {row["who"]: row for row in step if row.get("recipe") == LARGE and row.get("who")}
    rows = []

    def goal(text, threshold, value):
        try:
            number, card = value()
            rows.append(dict(goal=text, threshold=threshold, value=f"{number:.4g}", card=card))
        # a row or a number is missing
        except (KeyError, ValueError, ZeroDivisionError, StopIteration):
            rows.append(dict(goal=text, threshold=threshold, value="not measured", card=""))

    def ours(column):
        return float(large["ours"][column]), on_gpu(large["ours"])

    def speedup(variant):
        def value():
            images_s, card = ours("images_s")
            return images_s / float(large[variant]["images_s"]), card

        return value

    def memory_ratio():
        plain, our_rise = (
            float(large[who]["peak_mib"]) - float(large[who]["held_mib"])
            for who in ("plain compiled", "ours")
        )
        return plain / our_rise, on_gpu(large["ours"])

    def readout_memory():
        reads = {
            row["read"]: row
            for row in readout
            if row["count"] == "8192" and row["codes"] == "16384"
        }
        share = float(reads["blocks"]["peak_mib"]) / float(reads["matrix"]["peak_mib"])
        return share, on_gpu(reads["blocks"])

    def dry_run_error():
        ratio = float(large["ours"]["dry_run_mib"]) / float(large["ours"]["peak_mib"])
        return abs(ratio - 1), on_gpu(large["ours"])

    def sampled(num_rows, column):
        row = next(
            row
            for row in sampling
            if (row["size"], row["rows"], row["mode"], row["dtype"])
            == ("L", num_rows, "graph", "bfloat16")
        )
        return float(row[column]), on_gpu(row)

    goal(
        "joint step of L at 256 px: speed relative to the compiled plain step",
        ">= 1.2",
        speedup("plain compiled"),
    )
    goal(
        "joint step of L at 256 px: speed relative to the eager plain step",
        ">= 2.3",
        speedup("plain eager"),
    )
    goal(
        "joint step of L at 256 px: share of the measured product rate",
        ">= 0.43",
        lambda: ours("of_measured"),
    )
    goal("read-out by blocks: share of the matrix read-out's memory", "<= 0.125", readout_memory)
    goal(
        "joint step of L: activation memory of the plain step relative to ours",
        ">= 2",
        memory_ratio,
    )
    goal(
        "sampling of L, 64 rows: share of the bandwidth's bound",
        ">= 0.65",
        lambda: sampled("64", "of_bound"),
    )
    goal(
        "sampling of L, 64 rows: images per second (H100)",
        ">= 334",
        lambda: sampled("64", "images_s"),
    )
    goal(
        "sampling of L, 256 rows: share of the bandwidth's bound",
        ">= 0.65",
        lambda: sampled("256", "of_bound"),
    )
    goal(
        "sampling of L, 256 rows: images per second (H100)",
        ">= 500",
        lambda: sampled("256", "images_s"),
    )
    goal("joint step of L: waits for the device", "<= 1", lambda: ours("waits"))
    goal("dry run of L: relative difference from the allocator's peak", "<= 0.1", dry_run_error)
    return rows


def on_gpu(row):
    """Return the name of the GPU that measured a row; raises ValueError if it was no GPU."""
    if not row["device"].startswith("cuda"):
        raise ValueError(f"measured on {row['device']}")
    return row["card"]


# -- the command -----------------------------------------------------------------------------------


def has_gpu():
    """Tell whether torch, in the Python that runs this script, finds a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="every part at its smallest size")
    parser.add_argument("--deadline", type=float, default=590, help="seconds for everything")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT"), help="folder for the eight files"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for runs, caches and logs; the same folder again reuses compiled code",
    )
    parser.add_argument(
        "--parts", nargs="+", default=[], help="run only these parts; summary.csv lists all names"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not has_gpu():
        print(
            f"{sys.executable} finds no GPU. To try every part without a GPU: {TRIAL}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # exit through the `finally` of `run`, which stops the current part too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = Path(options.out or tempfile.mkdtemp(prefix="gear-gpu-")).resolve()
    work = Path(options.work or tempfile.mkdtemp(prefix="gear-gpu-work-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = visit(options, out, work)
    print((out / "report.txt").read_text()[-TAIL:])
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}; work in {work}")
    raise SystemExit(any(row["exit"] not in (0, "") for row in rows))


if __name__ == "__main__":
    main()
