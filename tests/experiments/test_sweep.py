"""A sweep does the missing work of a study and nothing else, lists one command per cell and seed,
and continues after a kill.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers import record_scored, record_study, recorded

from gear.__main__ import main
from gear.config import UserError, to_dict
from gear.experiments import sweep
from gear.experiments.recipes import TINY, recipe
from gear.experiments.studies import Scoring, members
from gear.runs.folder import runs_dir
from gear.runs.run import Run, run_names


def test_one_command_a_cell_and_seed(capsys):
    main(["sweep", "temperature", "--preset", "tiny", "--seeds", "0,2", "--list"])
    lines = capsys.readouterr().out.splitlines()
    cells = ["tau-0.5", "tau-0.1", "tau-0.05", "default", "tau-0.01", "tau-0.005"]
    assert [shlex.split(line)[-3] for line in lines] == [cell for cell in cells for _ in (0, 2)]
    main(
        [
            "sweep",
            "temperature",
            "--preset",
            "tiny",
            "--seeds",
            "0",
            "--cells",
            "tau-0.1",
            "--count",
            "50",
            "--list",
        ]
    )
    (one,) = capsys.readouterr().out.splitlines()
    assert (
        one == "gear sweep temperature --preset tiny --seeds 0 --cells tau-0.1 --jobs 1 --count 50"
    )
    covered = set()
    for line in lines:
        words = shlex.split(line)
        assert (
            words[:3] == ["gear", "sweep", "temperature"]
            and words[words.index("--preset") + 1] == "tiny"
        )
        seed, cell = int(words[words.index("--seeds") + 1]), words[words.index("--cells") + 1]
        covered |= {m.name for m in members("temperature", "tiny", [seed], [cell])}
    assert covered == {m.name for m in members("temperature", "tiny", [0, 2])}


def test_what_is_there_is_not_done_again(monkeypatch, capsys):
    """Finished runs need neither weights nor ancestors: the sweep only prints the table."""
    record_study("depth")
    monkeypatch.setattr(sweep, "work", lambda *_: pytest.fail("there is nothing to do"))
    main(["sweep", "depth", "--preset", "tiny", "--count", "100"])
    out = capsys.readouterr().out
    assert "18 runs in all, 0 to train with their parents, 0 sets of scores" in out
    assert (
        "after Benjamini and Hochberg's correction" in out and "layer 2 of 3" in out and "+-" in out
    )


def packed(*patterns):
    """Turn the runs whose names match `patterns` into records."""
    main(["pack", str(runs_dir() / "reference"), *patterns])
    for pattern in patterns:
        for folder in runs_dir().glob(pattern):
            shutil.rmtree(folder)


def planned(monkeypatch, count=100):
    """Return what a sweep of the study depth would do for seed 0: {task: the task that it needs},
    and the names of finished runs.
    """
    seen = {}
    monkeypatch.setattr(
        sweep, "work", lambda tasks, finished, *_: seen.update(tasks=tasks, finished=finished)
    )
    sweep.sweep("depth", "tiny", (0,), scoring=Scoring(count), tell=lambda _: None)
    return {task.name: task.needs for task in seen.get("tasks", ())}, seen.get("finished", set())


def test_a_record_with_its_scores_is_settled_and_else_it_is_trained_with_its_parents(monkeypatch):
    """Records have no weights: if a score is missing, the run and its parents are trained again."""
    record_study("depth", seeds=(0,))
    recorded(
        "tiny-tokenizer-s0", dict(members("depth", "tiny", [0])[0].planned)["tiny-tokenizer-s0"]
    )
    packed("tiny-*")
    assert planned(monkeypatch) == ({}, set())
    tasks, finished = planned(monkeypatch, count=77)
    names = {member.name for member in members("depth", "tiny", [0])}
    assert len(names) == 6 and {f"scores of {name}" for name in names} | names < tasks.keys()
    assert tasks["tiny-tokenizer-s0"] == "" and finished == set()


def test_a_run_goes_before_the_record_of_its_name(monkeypatch):
    record_study("depth", seeds=(0,))
    packed("tiny-*")
    config = members("depth", "tiny", [0], ["tap-0"])[1].planned[-1][1]
    recorded("tiny-joint-s0-tap-0", config)  # without scores, and without weights
    tasks, _ = planned(monkeypatch)
    assert (
        "scores of tiny-joint-s0-tap-0" in tasks
        and "tiny-joint-s0-tap-0" in tasks
        and "tiny-joint-s0" not in tasks
    )
    recorded("tiny-joint-s0-tap-0", replace(config, batch_size=7))
    with pytest.raises(UserError, match="batch_size: 7 -> "):
        planned(monkeypatch)


def test_a_record_of_another_configuration_settles_nothing(monkeypatch):
    member = members("depth", "tiny", [0], ["tap-0"])[1]
    record_study("depth", seeds=(0,))
    record_scored(member.name, replace(member.planned[-1][1], batch_size=7))
    packed("tiny-*")
    tasks, _ = planned(monkeypatch)
    assert {
        member.name,
        f"scores of {member.name}",
    } <= tasks.keys() and "tiny-joint-s0" not in tasks


def test_what_is_missing_is_planned_with_its_cost(monkeypatch):
    record_study("depth", seeds=(0,))
    (runs_dir() / "tiny-joint-s0" / "metrics.json").unlink()
    (runs_dir() / "tiny-joint-s0" / "checkpoints" / "0000024").mkdir(parents=True)  # it has weights
    seen = {}
    messages = []
    monkeypatch.setattr(
        sweep,
        "work",
        lambda tasks, finished, jobs, done: seen.update(tasks=tasks, finished=finished, jobs=jobs),
    )
    sweep.sweep(
        "depth", "tiny", (0, 1), ["default", "tap-0"], scoring=Scoring(100), tell=messages.append
    )
    names = [task.name for task in seen["tasks"]]
    assert names == [
        "tiny-tokenizer-s1",
        "tiny-llamagen-repa-s1-tap-0",
        "tiny-joint-s1-tap-0",
        "tiny-llamagen-repa-s1",
        "tiny-joint-s1",
        "scores of tiny-llamagen-repa-s1-tap-0",
        "scores of tiny-joint-s1-tap-0",
        "scores of tiny-joint-s0",
        "scores of tiny-llamagen-repa-s1",
        "scores of tiny-joint-s1",
    ]
    by_name = {task.name: task for task in seen["tasks"]}
    task = by_name["tiny-joint-s1-tap-0"]
    planned = dict(members("depth", "tiny", [1], ["tap-0"])[1].planned)
    words = ("train", "tiny-joint-s1", "--tap-layer", "0", "--label", "tap-0")
    assert task.command[:6] == words
    assert task.images == planned[task.name].steps * planned[task.name].batch_size
    assert task.needs == "tiny-tokenizer-s1" == by_name["tiny-llamagen-repa-s1"].needs
    assert by_name[task.needs].needs == ""
    assert by_name["scores of tiny-joint-s0"].needs in seen["finished"] and seen["jobs"] >= 1
    configs = {
        name: config
        for member in members("depth", "tiny", [1], ["default", "tap-0"])
        for name, config in member.planned
    }
    images = sum(config.steps * config.batch_size for config in configs.values())
    assert "5 to train with their parents, 5 sets of scores" in messages[0]
    assert "FLOP" in messages[0] and "h100" in messages[0]
    assert f"{images:,} images" in messages[0] and len(configs) == 5
    assert "not known before a run of the stage" in messages[0]


def test_a_command_trains_what_it_alone_starts_from(monkeypatch):
    """A run is trained once, and every task needs another task or a finished run, whichever runs
    exist already.
    """
    seen = {}
    monkeypatch.setattr(
        sweep, "work", lambda tasks, finished, *_: seen.update(tasks=tasks, finished=finished)
    )

    def chains(**settled):
        for name, config in settled.items():
            (recorded(name.replace("_", "-"), config).path / "checkpoints" / "0000024").mkdir(
                parents=True
            )
        options = dict(scoring=Scoring(100), tell=lambda _: None, transfer=True)
        sweep.sweep("depth", "tiny", (0,), ["tap-0"], **options)
        names = {task.name for task in seen["tasks"]}
        assert all(
            not task.needs or task.needs in names | set(seen["finished"]) for task in seen["tasks"]
        )
        return {task.name: (task.images, task.needs) for task in seen["tasks"] if task.images}

    baseline, joint, fresh = members("depth", "tiny", [0], ["tap-0"], transfer=True)
    assert [m.role for m in (baseline, joint, fresh)] == ["baseline", "gear", "transfer"]
    assert (joint.name, fresh.name) == ("tiny-joint-s0-tap-0", "tiny-gear-s0-tap-0")
    images = {
        name: config.steps * config.batch_size for name, config in fresh.planned + baseline.planned
    }
    assert chains() == {
        "tiny-tokenizer-s0": (images["tiny-tokenizer-s0"], ""),
        baseline.name: (images[baseline.name], "tiny-tokenizer-s0"),
        joint.name: (images[joint.name], "tiny-tokenizer-s0"),
        fresh.name: (images[fresh.name], joint.name),
    }
    record_scored(baseline.name, baseline.planned[-1][1])
    record_scored(fresh.name, fresh.planned[-1][1])  # GEAR alone starts from the warm-up then
    both = images["tiny-tokenizer-s0"] + images[joint.name]
    assert chains() == {joint.name: (both, "")}
    task = next(task for task in seen["tasks"] if task.images)
    Run.create("tiny-tokenizer-s0", to_dict(joint.planned[0][1]))
    assert task.progress() == "at step 0 of its parent 'tiny-tokenizer-s0'"
    shutil.rmtree(runs_dir() / "tiny-tokenizer-s0")
    assert chains(tiny_tokenizer_s0=joint.planned[0][1]) == {
        joint.name: (images[joint.name], "tiny-tokenizer-s0")
    }


def test_mistakes_are_told_before_anything_runs(capsys, home):
    for words, message in (
        ([], "name one study"),
        (["temprature"], "Did you mean 'temperature'"),
        (["depth", "--preset", "tinny"], "no study of preset 'tinny'"),
        (["depth", "--preset", "tiny", "--seeds", "x"], "seeds are 'x'"),
        (["depth", "--preset", "tiny", "--cells", "tap-9"], "has no cell tap-9"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["sweep", *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (home / "runs").exists()


SWEEP = [
    sys.executable,
    "-m",
    "gear",
    *"sweep initialisation --preset tiny --seeds 0 --count 70 --jobs 2".split(),
]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(home):
    """After kill -9 during a training, the trained process ends too, and the same command does the
    remaining work once.
    """
    process = subprocess.Popen(SWEEP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not any(Run.open(n).logged_step > 2 for n in run_names("tiny-joint-s0")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # long before the training would end by itself, even on an idle machine
    deadline = time.time() + 20
    while orphans := [p for p in os.listdir("/proc") if p.isdigit() and _belongs(p, str(home))]:
        assert time.time() < deadline, f"processes {orphans} still train"
        time.sleep(0.1)
    joint, warm_up = Run.open("tiny-joint-s0"), Run.open("tiny-tokenizer-s0")
    assert not joint.is_finished and warm_up.is_finished
    start_times = [(run.path / "config.json").stat().st_mtime_ns for run in (joint, warm_up)]
    second = subprocess.run(SWEEP, capture_output=True, text=True, timeout=500)
    assert second.returncode == 0, second.stderr
    assert [
        (run.path / "config.json").stat().st_mtime_ns for run in (joint, warm_up)
    ] == start_times, "neither run started again"
    assert "not testable: 1 seed" in second.stdout and "from nothing" in second.stdout
    third = subprocess.run(SWEEP, capture_output=True, text=True, timeout=100)
    assert "0 to train with their parents, 0 sets of scores" in third.stdout
    assert (
        recipe("tiny-joint-no-init-s0").tokenizer_run == ""
        and Run.open("tiny-joint-no-init-s0").is_finished
    )


def _belongs(process, home):
    try:
        with (
            open(f"/proc/{process}/environ", "rb") as environment,
            open(f"/proc/{process}/cmdline", "rb") as command,
        ):
            return home.encode() in environment.read() and b"gear\0train" in command.read()
    except OSError:
        return False


@pytest.mark.parametrize(
    "cores, sizes, jobs",
    [(16, (32, 32), 8), (4, (32,), 2), (1, (32,), 1), (64, (32,), 8), (16, (32, 256), 1)],
)
def test_small_runs_share_a_gpu(cores, sizes, jobs, monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: range(cores))
    configs = [
        replace(TINY, batch_size=64, data=replace(TINY.data, image_size=size)) for size in sizes
    ]
    assert sweep._jobs(configs, on_gpu=True) == jobs
    assert sweep._jobs(configs, on_gpu=False) == cores
