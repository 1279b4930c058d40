"""Training several runs at once: parents come first, shared parents are trained once, and a failure
stops only the runs that need the failed one.
"""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
from helpers import assert_same_run
from test_cli import fingerprint

from gear.cli.arguments import parse
from gear.cli.train import TrainOptions
from gear.config import TrainingStopped, UserError, __version__
from gear.experiments import jobs
from gear.experiments.recipes import plan, recipe
from gear.runs.run import Run
from gear.training.loop import Runtime


def test_plan_lists_ancestors_first_and_passes_the_seed_on():
    names = [name for name, _ in plan(recipe("scenes-gear-s2"), "scenes-gear-s2")]
    assert names == ["scenes-tokenizer-s2", "scenes-joint-s2", "scenes-gear-s2"]
    assert {config.seed for _, config in plan(recipe("scenes-gear-s2"), "scenes-gear-s2")} == {2}


def test_a_change_that_concerns_the_joint_stage_alone_leaves_the_warm_up_shared():
    base = recipe("tiny")
    changed = replace(base, objective=replace(base.objective, tau=0.3))
    planned = plan(changed, "tiny-x", base, "x")
    assert [name for name, _ in planned] == ["tiny-tokenizer", "tiny-joint-x", "tiny-x"]
    assert planned[1][1].objective.tau == 0.3 and planned[2][1].tokenizer_run == "tiny-joint-x"


def test_how_runs_are_executed_is_handed_on():
    """A command gets every option of the Runtime that differs from its default; --fsdp is refused
    for several runs.
    """
    runtime = Runtime(device="cpu", accumulate=2, skip=3, keep=5, cached=True, tensorboard=True)
    command = jobs.training([("tiny", recipe("tiny"))], ("tiny",), runtime).command
    assert command[:2] == ("train", "tiny")
    assert parse(TrainOptions(recipe("tiny")), list(command[2:])).runtime == replace(
        runtime, quiet=True, threads=1
    )
    with pytest.raises(UserError, match="--fsdp is for one run"):
        jobs.train_many(["tiny"], 1, Runtime(fsdp=True))


def test_runs_are_trained_once_and_in_order(tiny, tiny_runs):
    """A missing parent is trained first; finished runs stay as they are."""
    for name in ("tiny", "tiny-joint"):
        shutil.rmtree(tiny / name)
    before = fingerprint(tiny)
    jobs.train_many(["tiny", "tiny-joint"], jobs=2)
    for name in ("tiny", "tiny-joint"):
        assert_same_run(tiny / name, tiny_runs / name)
    assert before.items() <= fingerprint(tiny).items()


def test_another_configuration_under_a_name_is_found_before_anything_starts(home):
    Run.create("tiny-tokenizer", {"recipe": "tiny-tokenizer", "stage": "tokenizer", "steps": 99})
    with pytest.raises(UserError, match="steps: 99 -> 24"):
        jobs.train_many(["tiny"], jobs=2)
    assert [p.name for p in (home / "runs").iterdir()] == ["tiny-tokenizer"]


def test_a_failure_takes_only_its_descendants(monkeypatch):
    """If one of two parents fails, the error names it and its descendants, and the other parent's
    child is trained.
    """
    failing = "import sys; sys.exit('no luck' if 'tiny-tokenizer' in sys.argv else 0)"
    popen = subprocess.Popen

    def start(command, **options):
        name = command[4]
        started.append(name)
        return popen([sys.executable, "-c", failing, name], **options)

    started = []
    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    with pytest.raises(TrainingStopped) as failed:
        jobs.train_many(["tiny", "scenes-llamagen-s0"], jobs=2)
    assert (
        started.count("scenes-tokenizer-s0") == 1
        and "scenes-llamagen-s0" in started
        and "tiny" not in started
    )
    lines = str(failed.value).splitlines()
    assert (
        lines[0] == "tiny-tokenizer: no luck"
        and "tiny-joint: its parent tiny-tokenizer failed" in lines
    )
    assert not any("scenes" in line for line in lines)


def test_a_change_reaches_the_parent_field_by_field():
    """A new tau for the generator on the naive tokenizer leaves its parent's bridge naive."""
    base = recipe("scenes-naive")
    planned = dict(plan(replace(base, objective=replace(base.objective, tau=0.05)), "n", base, "x"))
    parent = planned["scenes-joint-naive-x"]
    assert parent.objective.bridge == "naive"
    assert parent.objective.tau == 0.05


def test_a_source_of_as_many_classes_changes_the_parents_by_the_source_alone(home):
    """`gear train cifar10-smoke-gear-s0 --source ZIP --label zip` gives source and label to every
    ancestor, and downloads nothing.
    """
    with zipfile.ZipFile(home / "ten.zip", "w") as archive:
        for i in range(30):
            archive.writestr(f"{i % 10}/{i}.png", b"not looked at")
    base = recipe("cifar10-smoke-gear-s0")
    changed = replace(base, data=replace(base.data, source=str(home / "ten.zip")))
    planned = plan(changed, "cifar10-smoke-gear-s0-zip", base, "zip")
    assert [name for name, _ in planned] == [
        f"cifar10-smoke-{stage}-s0-zip" for stage in ("tokenizer", "joint", "gear")
    ]
    for (_, config), (_, original) in zip(planned, plan(base, "cifar10-smoke-gear-s0")):
        assert config.data == changed.data and config.generator.num_classes == 10
        assert replace(config, data=original.data, tokenizer_run=original.tokenizer_run) == original
    with pytest.raises(UserError, match="--label"):
        plan(changed, "cifar10-smoke-gear-s0", base)


def test_a_run_started_here_imports_nothing_that_lies_here(home, monkeypatch):
    for module in ("gear", "random", "torch"):
        (home / f"{module}.py").write_text("raise SystemExit('taken for the library')")
    monkeypatch.chdir(home)
    process, log = jobs._start(("--version",))
    assert process.wait() == 0
    log.seek(0)
    assert log.read().decode().strip() == f"gear {__version__}"
