"""The benchmarks run at their smallest size, and `gpu.py` respects its limits and its deadline and
writes its eight files.
"""

import csv
import functools
import io
import multiprocessing
import re
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import recorded

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import kernels  # noqa: E402
import measure  # noqa: E402
import sampling  # noqa: E402
import step  # noqa: E402

from gear.__main__ import main  # noqa: E402
from gear.data import DataConfig  # noqa: E402
from gear.evaluation.lpips import load_lpips  # noqa: E402
from gear.experiments.recipes import recipe  # noqa: E402
from gear.generator.config import GENERATORS  # noqa: E402
from gear.generator.model import Generator  # noqa: E402
from gear.teachers import load_teacher  # noqa: E402

FILES = {
    "env.txt",
    "junit.xml",
    "summary.csv",
    "goals.csv",
    "report.txt",
    "tables.tgz",
    "runs.tgz",
    "log.tgz",
}
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
CPU = torch.device("cpu")


@pytest.fixture
def folders(home):
    """The folder of the eight files, and the folder of all other files."""
    for folder in (home / "out", home / "work" / "log"):
        folder.mkdir(parents=True)
    return home / "out", home / "work"


def visited(parts, folders, monkeypatch, deadline=60):
    """Run a visit with these parts instead of the real ones; returns {name: row of summary.csv}."""
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    gpu.visit(Namespace(deadline=deadline, parts=[]), *folders)
    with open(folders[0] / "summary.csv", newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


def test_a_part_that_fails_does_not_keep_the_next_one_from_running(folders, monkeypatch):
    fails, works = (
        [sys.executable, "-c", f"print('said {code}'); raise SystemExit({code})"] for code in (3, 0)
    )
    rows = visited(
        [gpu.Part("one", 20, [works, fails, works]), gpu.Part("two", 20, [works])],
        folders,
        monkeypatch,
    )
    assert (rows["one"]["exit"], rows["two"]["exit"]) == ("3", "0")
    assert rows["one"]["note"].startswith("exit code of: python")
    assert {path.name for path in folders[0].iterdir()} == FILES
    with tarfile.open(folders[0] / "log.tgz") as tar:
        log = tar.extractfile("one.txt").read().decode()
    assert [line for line in log.splitlines() if line.startswith("said")] == [
        "said 0",
        "said 3",
        "said 0",
    ]


def test_a_part_is_stopped_at_its_limit_and_training_may_be(folders, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    parts = [gpu.Part("slow", 0.4, [SLEEP]), gpu.Part("training", 1, [SLEEP], lasts=True)]
    rows = visited(parts, folders, monkeypatch, gpu.PACKING + gpu.GRACE + 1.2)
    assert rows["slow"]["exit"] == "124" and rows["slow"]["note"] == "stopped after 0.4 s"
    assert rows["training"]["exit"] == "0" and rows["training"]["note"].startswith(
        "stopped after 0.7"
    )


def test_a_part_that_no_longer_fits_is_skipped_and_said_to_be(folders, monkeypatch):
    rows = visited(
        [gpu.Part("long", 100, [SLEEP]), gpu.Part("short", 10, [["true"]])],
        folders,
        monkeypatch,
        30,
    )
    assert (
        rows["long"]["exit"] == ""
        and rows["long"]["note"] == "skipped: 30 s are left until the deadline"
    )
    assert rows["short"]["exit"] == "0"


def test_training_leaves_the_parts_after_it_their_time():
    later = [gpu.Part("scores", 45, [])]
    assert (
        gpu.allowance(gpu.Part("training", 240, [], lasts=True), 300, later)
        == 300 - 45 - gpu.PACKING - gpu.GRACE
    )
    assert gpu.allowance(gpu.Part("training", 240, [], lasts=True), 70, later) == 0
    later.insert(0, gpu.Part("training", 240, [], lasts=True))
    assert (
        gpu.allowance(gpu.Part("step", 100, []), 200, later) == 200 - 120 - gpu.PACKING - gpu.GRACE
    )


def test_what_a_part_started_ends_with_it(folders):
    script = (
        f"import subprocess, sys; print(subprocess.Popen({SLEEP}).pid, flush=True); import time; "
        "time.sleep(60)"
    )
    code, _ = gpu.run(gpu.Part("family", 1, [[sys.executable, "-c", script]]), 1, folders[1])
    pid = (folders[1] / "log" / "family.txt").read_text().split()[-1]
    time.sleep(0.2)
    status = Path(f"/proc/{pid}/stat")
    assert code == 124 and (not status.exists() or status.read_text().split()[2] == "Z")


def test_goals_are_not_measured_without_a_gpu_and_computed_with_one(home):
    rows = gpu.goals(home)
    assert len(rows) == 11 and {row["value"] for row in rows} == {"not measured"}
    about = dict(recipe="imagenet256-l-joint", card="H100", device="cuda")
    who = {"plain eager": 40.0, "plain compiled": 100.0, "ours": 130.0}
    memory = {"plain eager": 9000, "plain compiled": 9000, "ours": 5000}
    numbers = dict(held_mib=1000, dry_run_mib=4500, of_measured=0.44, waits=1)
    table = [
        about | numbers | dict(who=name, images_s=rate, peak_mib=memory[name])
        for name, rate in who.items()
    ]
    sampling_row = dict(
        size="L",
        rows=64,
        mode="graph",
        dtype="bfloat16",
        of_bound=0.7,
        images_s=350,
        device="cuda",
        card="H100",
    )
    readout_row = dict(
        count=8192, codes=16384, width=1024, precision="bf16", device="cuda", card="H100"
    )
    measure.write_table(table, home / "step.csv")
    measure.write_table([sampling_row], home / "sampling.csv")
    measure.write_table(
        [readout_row | dict(read=n, peak_mib=p) for n, p in (("blocks", 400), ("matrix", 4000))],
        home / "readout.csv",
    )
    rows = gpu.goals(home)
    values = [row["value"] for row in rows]
    assert values == [
        "1.3",
        "3.25",
        "0.44",
        "0.1",
        "2",
        "0.7",
        "350",
        "not measured",
        "not measured",
        "1",
        "0.1",
    ]
    assert {row["card"] for row in rows if row["value"] != "not measured"} == {"H100"}
    measure.write_table([row | dict(device="cpu") for row in table], home / "step.csv")
    assert gpu.goals(home)[0]["value"] == "not measured"


@pytest.mark.slow
def test_without_a_gpu_one_sentence_says_so(home):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}", f"BIN={home}"]
    done = subprocess.run(command, capture_output=True, text=True)
    messages = done.stderr.splitlines()
    assert done.returncode == 2
    assert (
        messages[0]
        == f"{sys.executable} finds no GPU. To try every part without a GPU: {gpu.TRIAL}"
    )


# -- the benchmarks' computations ------------------------------------------------------------------


@pytest.mark.slow
def test_the_bound_of_sampling_is_what_weights_and_cache_take():
    """LlamaGen-L at 3.0 TB/s: with 64 rows 1.46 GB per token and 514 images/s, with 256 rows 3.88 GB
    and 773 images/s.
    """
    with torch.device("meta"):
        generator = Generator(GENERATORS["L"], 16_384)
    sizes = [sampling.bytes_per_token(generator, rows, 256, torch.bfloat16) for rows in (64, 256)]
    assert [round(size / 1e9, 2) for size in sizes] == [1.46, 3.88]
    rates = [3e12 / size / 256 * rows for size, rows in zip(sizes, (64, 256))]
    assert rates == pytest.approx([514, 773], rel=0.002)


def test_idle_time_is_what_no_kernel_covers():
    assert kernels.idle([(0, 2), (1, 5), (3, 4), (7, 8), (10, 11)]) == 4
    assert kernels.idle([]) == 0


def test_a_table_of_a_cpu_names_it_and_has_no_data_sheet(monkeypatch):
    assert (
        measure.card(CPU) in Path("/proc/cpuinfo").read_text() and measure.data_sheet(CPU) is None
    )
    monkeypatch.setattr(measure, "card", lambda device: "NVIDIA H100 80GB HBM3")
    assert measure.data_sheet(torch.device("cuda")).bf16 == 989.4


@pytest.mark.slow
def test_memory_rises_by_what_is_held_at_once():
    """Measured in a new process, which has no freed memory to reuse."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        rise, held = process.submit(
            measure.memory_rise, functools.partial(torch.ones, 2**26), CPU
        ).result()  # 256 MiB
    assert 250 < rise < 300 and held > 100


def test_the_public_statistics_are_read_of_the_whole_matrix():
    options = Namespace(
        device=CPU,
        batch=4,
        accumulate=1,
        checkpointing=False,
        compile=False,
        precision="",
        random_weights=False,
    )
    lab = step.Lab(step.prepared("tiny-joint", options), options)
    assert lab.who == {"plain eager": "plain", "ours": "plain"}
    parts = lab.clock("plain eager")
    assert {"statistics", "tokenizer_update", "clip and step"} <= parts.keys()
    assert "statistics" not in lab.clock("ours")
    step.compare_losses(lab)


@pytest.mark.slow
def test_random_weights_have_the_true_architecture_and_are_said_to_be():
    with step.random_weights() as names:
        teacher = load_teacher("dinov2-b", DataConfig("scenes", image_size=32), 16)
        lpips = load_lpips()
    assert names == ["dinov2-b", "LPIPS"]
    assert sum(p.numel() for p in teacher.network.parameters()) == 86_579_712
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert teacher(images).shape == (2, 4, 768) and lpips(images, -images).isfinite().all()


@pytest.mark.slow
def test_a_quick_visit_runs_every_part_on_a_cpu(home):
    """It takes less than four minutes on two loaded cores, every part ends with exit code 0, and no
    file is missing or empty.
    """
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu.py",
        "--quick",
        "--device",
        "cpu",
        "--out",
        home / "out",
    ]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--work", home / "work"], capture_output=True, text=True, cwd=home
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert time.monotonic() - start < 240
    with open(home / "out" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["exit"] for row in rows] == ["0"] * 12 and not any(row["note"] for row in rows)
    assert {path.name for path in (home / "out").iterdir()} == FILES
    assert all(path.stat().st_size > 100 for path in (home / "out").iterdir())
    with tarfile.open(home / "out" / "tables.tgz") as tar:
        tables = "analysis ceilings kernels largest others readout sampling step".split()
        assert tar.getnames() == [f"{table}.csv" for table in tables]
        rows = list(csv.DictReader(io.TextIOWrapper(tar.extractfile("step.csv"))))
    assert [(row["who"], row["note"]) for row in rows] == [("plain eager", ""), ("ours", "")]
    assert all(
        row["card"] == measure.card(CPU) and 0 < float(row["of_measured"]) < 1 for row in rows
    )
    with tarfile.open(home / "out" / "runs.tgz") as tar:
        files = {
            f"tiny-llamagen-repa/{name}"
            for name in ("metrics.jsonl", "metrics.json", "analysis/layer_profile.parquet")
        }
        assert files <= set(tar.getnames()) and not any(
            "checkpoints" in name for name in tar.getnames()
        )
    assert 'failures="0"' in (home / "out" / "junit.xml").read_text()


# -- docs/gpu.md -----------------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "gpu.md").read_text()
COMMANDS = [
    line.split("  #")[0].split()[1:]
    for line in DOCS.splitlines()
    if line.startswith("gear ") and "--device cuda" in line
]


def test_the_page_names_the_files_that_come_back(folders):
    assert set(re.findall(r"^\| `([\w.]+)` \|", DOCS, re.M)) >= FILES
    options = Namespace(device="cuda", quick=False)
    names = {part.name for part in gpu.parts(options, *folders)}
    assert set(re.search(r"--parts ([a-z ]+)", DOCS)[1].split()) < names


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_the_commands_of_the_page_are_understood(words, home, capsys):
    """Only the device is missing on this machine."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recorded("scenes-gear-s0", recipe("scenes-gear-s0"))
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and "no device 'cuda' here" in capsys.readouterr().err
