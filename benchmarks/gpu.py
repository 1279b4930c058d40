"""All that a short visit to a GPU should do, in one command: tests, rates, timings, memory, and
training until the deadline.

`make gpu`, or `python benchmarks/gpu.py [--deadline 590] [--out FOLDER] [--parts NAME ...]`. Each
part is a process of its own with a limit; its exit code and seconds go to summary.csv, and the next
part runs regardless. A part for which less than half of its limit is left is skipped, and said to
be. FOLDER (default: $OUT, else a new folder) gets eight small files, which are written anew after
every part: what a kill leaves is complete up to there. No part needs a network or an installed
package of gear: the Python that runs this script runs them all, and wheels in `wheels/` beside the
Makefile are installed first.

`--quick --device cpu` runs every part at its smallest size, to see that all of them work.
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
PACKING = 8  # seconds kept back for the last files
GRACE = 12  # seconds that a part which ran out of time has to save what it can
LEAST = 20  # seconds below which training is not begun
STOPPED = 124  # exit code of a part that was stopped at its limit, as timeout(1) has it
SEEDS = range(3, 8)  # beside the records, 0 to 2
LARGE = "imagenet256-l-joint"  # what the goals are about
METHODS = "joint-naive gear llamagen-repa llamagen-repa-control llamagen-repa-half".split()
FEW = "blocks or joint_step or cache or waits"  # tests of a quick visit
SUMMARY = ("part", "seconds", "limit", "exit", "note")
TRIAL = "`python benchmarks/gpu.py --quick --device cpu`"
TAIL = 11_000  # characters of the report that are printed last
# of a run, and its last samples
KEPT = ("config.json", "metrics.jsonl", "timing.jsonl", "metrics.json", "analysis/*")


@dataclass(frozen=True)
class Part:
    """A part of the visit: commands, run one after another, whichever fails, and the seconds they
    may take together.

    `lasts` says that the part takes whatever time there is and ends with it: to be stopped is no
    failure.
    """

    name: str
    limit: float
    commands: list
    lasts: bool = False


def parts(options, out, work):
    """Return the Parts of a visit in their order; `out` gets the eight files, `work` everything
    else.
    """
    python, device, quick = sys.executable, options.device, ["--quick"] * options.quick
    tables = work / "tables"

    def bench(name, *words, table=None):
        written = ["--device", device, "--out", str(tables / f"{table or name}.csv"), *quick]
        return [python, str(HERE / f"{name}.py"), *words, *written]

    wheels, setup = sorted((ROOT / "wheels").glob("*.whl")), []
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
    # as in test_x[cuda-...]
    chosen = ["-k", f"[{device.partition(':')[0]}" + (f" and ({FEW})" if options.quick else "")]
    tests += [
        str(ROOT / "tests" / "training" / "test_cuda.py"),
        f"--junitxml={out / 'junit.xml'}",
        *chosen,
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
    """Return the environment of every part: this gear, and every cache in the folder of this
    visit.
    """
    paths = [str(ROOT), str(work / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = {"GEAR_RUNS": "runs", "GEAR_FIGURES": "figures", "GEAR_CACHE": "cache"}
    names |= {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    folders = {name: str(work / folder) for name, folder in names.items()}
    fixed = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | folders | fixed


def run(part, limit, work):
    """Run a part's commands for `limit` seconds at most, its output to a log; returns (exit code,
    note).
    """
    end, failure = time.monotonic() + limit, (0, "")
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
    """End a part and all that it started: first asked, so that it can save, then killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in that group
    except ProcessLookupError:
        pass
    process.wait()


def allowance(part, left, later):
    """Return the seconds that a part gets of those `left`, or 0: it is skipped.

    Of the parts `later`, one that lasts is kept half of its limit; to one that lasts, the others
    come before it.
    """
    usable = left - PACKING - GRACE
    if part.lasts:
        usable -= sum(other.limit for other in later)
        return usable if usable >= LEAST else 0
    usable -= sum(other.limit / 2 for other in later if other.lasts)
    return min(part.limit, usable) if usable >= part.limit / 2 else 0


def visit(options, out, work):
    """Run the parts one after another until the deadline; returns the rows of summary.csv."""
    deadline, rows = time.monotonic() + options.deadline, []
    for folder in ("log", "tables", "runs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    chosen = [
        part for part in parts(options, out, work) if part.name in (options.parts or [part.name])
    ]
    for i, part in enumerate(chosen):
        start = time.monotonic()
        limit = allowance(part, deadline - start, chosen[i + 1 :])
        if limit:
            code, note = run(part, limit, work)
        else:
            code, note = (
                "",
                f"skipped: {max(0, deadline - start):.0f} s are left until the deadline",
            )
        rows.append(
            dict(
                zip(
                    SUMMARY,
                    (part.name, f"{time.monotonic() - start:.1f}", f"{limit:.0f}", code, note),
                )
            )
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        pack(rows, out, work)
    return rows


# -- what comes back -------------------------------------------------------------------------------


def pack(rows, out, work):
    """Write the eight files as far as they are known: env.txt and junit.xml are the parts' own."""
    for name in ("env.txt", "junit.xml"):
        if not (out / name).exists():
            (out / name).write_text("")
    write_csv(rows, SUMMARY, out / "summary.csv")
    write_csv(goals(work / "tables"), ("goal", "threshold", "value", "card"), out / "goals.csv")
    archive(out / "tables.tgz", work / "tables", (work / "tables").glob("*.csv"))
    runs = list((work / "runs").glob("*/"))
    kept = [file for run in runs for pattern in KEPT for file in run.glob(pattern)]
    archive(
        out / "runs.tgz",
        work / "runs",
        [*kept, *(max(run.glob("samples/*"), default=run) for run in runs)],
    )
    archive(out / "log.tgz", work / "log", (work / "log").glob("*.txt"))
    (out / "report.txt").write_text(report(out, work))


def write_csv(rows, columns, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Return the rows of a CSV file as dicts of texts, none where it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def archive(path, folder, files):
    """Write those of the paths in `folder` that are files to a .tgz."""
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(file for file in files if file.is_file()):
            tar.add(file, file.relative_to(folder))


def report(out, work):
    """Return every table as text, the shortest last: the end is what a terminal keeps."""
    files = [*sorted((work / "tables").glob("*.csv"), key=lambda path: -path.stat().st_size)]
    files += [out / "goals.csv", out / "summary.csv"]
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in files)


# -- what a GPU has to show ------------------------------------------------------------------------


def goals(tables):
    """Return a row for each goal: its threshold, and its value, "not measured" without a GPU's
    own.
    """
    step, sampling = (read_csv(tables / f"{name}.csv") for name in ("step", "sampling"))
    readout = read_csv(tables / "readout.csv")
    large = {row["who"]: row for row in step if row.get("recipe") == LARGE and row.get("who")}
    found = []

    def goal(text, threshold, value):
        try:
            number, card = value()
            found.append(dict(goal=text, threshold=threshold, value=f"{number:.4g}", card=card))
        except (
            KeyError,
            ValueError,
            ZeroDivisionError,
            StopIteration,
        ):  # a row or a number that is not there
            found.append(dict(goal=text, threshold=threshold, value="not measured", card=""))

    def ours(column):
        return float(large["ours"][column]), on_gpu(large["ours"])

    def faster(than):
        return lambda: (ours("images_s")[0] / float(large[than]["images_s"]), ours("images_s")[1])

    def lighter():
        rise = [
            float(large[who]["peak_mib"]) - float(large[who]["held_mib"])
            for who in ("plain compiled", "ours")
        ]
        return rise[0] / rise[1], on_gpu(large["ours"])

    def of_dense():
        rows = {
            row["read"]: row
            for row in readout
            if row["count"] == "8192" and row["codes"] == "16384"
        }
        return float(rows["blocks"]["peak_mib"]) / float(rows["matrix"]["peak_mib"]), on_gpu(
            rows["blocks"]
        )

    def dry_run():
        return abs(
            float(large["ours"]["dry_run_mib"]) / float(large["ours"]["peak_mib"]) - 1
        ), on_gpu(large["ours"])

    def drawn(rows, column):
        row = next(
            r
            for r in sampling
            if (r["size"], r["rows"], r["mode"], r["dtype"]) == ("L", rows, "graph", "bfloat16")
        )
        return float(row[column]), on_gpu(row)

    goal(
        "joint step of L at 256 px, times the compiled plain step",
        ">= 1.2",
        faster("plain compiled"),
    )
    goal("joint step of L at 256 px, times the eager plain step", ">= 2.3", faster("plain eager"))
    goal(
        "joint step of L, share of the product rate that was measured",
        ">= 0.43",
        lambda: ours("of_measured"),
    )
    goal("read-out memory, share of the matrix's", "<= 0.125", of_dense)
    goal("joint step of L, the plain step's memory for activations over ours", ">= 2", lighter)
    goal(
        "sampling of L, 64 rows: share of the bandwidth's bound",
        ">= 0.65",
        lambda: drawn("64", "of_bound"),
    )
    goal(
        "sampling of L, 64 rows, images a second (H100)", ">= 334", lambda: drawn("64", "images_s")
    )
    goal(
        "sampling of L, 256 rows: share of the bandwidth's bound",
        ">= 0.65",
        lambda: drawn("256", "of_bound"),
    )
    goal(
        "sampling of L, 256 rows, images a second (H100)",
        ">= 500",
        lambda: drawn("256", "images_s"),
    )
    goal("waits for the device in a joint step of L", "<= 1", lambda: ours("waits"))
    goal("dry run of L, difference from the allocator's peak", "<= 0.1", dry_run)
    return found


def on_gpu(row):
    """Return the card of a row; raises ValueError where it is no GPU's."""
    if not row["device"].startswith("cuda"):
        raise ValueError(row["device"])
    return row["card"]


# -- the command -----------------------------------------------------------------------------------


def has_gpu():
    """Tell whether this Python's torch finds a GPU."""
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
        "--out", type=Path, default=os.environ.get("OUT"), help="folder of the eight files"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of runs, caches and logs; given again, compiled code is used again",
    )
    parser.add_argument(
        "--parts", nargs="+", default=[], help="these alone; the summary names all of them"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not has_gpu():
        print(
            f"{sys.executable} finds no GPU; without one, {TRIAL} tries every part.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # so that the part under way is stopped, too
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
