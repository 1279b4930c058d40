"""A killed run that is resumed ends with the bytes of an uninterrupted one; a run whose loss is not
finite stops and keeps its last good checkpoint.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_run

from gear import load_tokenizer
from gear.config import TrainingStopped, UserError, from_dict
from gear.data import load
from gear.experiments.recipes import recipe
from gear.runs.run import Run
from gear.training import objectives, validate
from gear.training.loop import Runtime, train
from gear.training.settings import Config
from gear.training.state import State
from gear.training.validate import tokenizer_metrics

QUIET = Runtime(device="cpu", quiet=True)


def gear_train(name):
    command = [
        sys.executable,
        "-m",
        "gear",
        "train",
        name,
        "--quiet",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after_checkpoint(name, runs, step):
    """Start training and kill -9 it once the checkpoint of `step` exists; returns the steps of all
    checkpoints.
    """
    process = gear_train(name)
    deadline = time.time() + 120
    while not (runs / name / "checkpoints" / f"{step:07d}").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.003)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return Run.open(name).checkpoint_steps()


@pytest.mark.parametrize(
    "name",
    ["tiny-joint", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiny-tokenizer", "tiny"))],
)
def test_kill_9_then_the_same_command_gives_the_same_bytes(name, tiny, tiny_runs):
    (tiny / name).rename(tiny / "whole")
    checkpoints = kill_after_checkpoint(name, tiny, step=6)  # before the discriminator's first step
    assert checkpoints and checkpoints[-1] < 24, "the kill came too late to test anything"
    assert gear_train(name).wait() == 0
    assert_same_run(tiny / name, tiny_runs / name)


@pytest.mark.slow
def test_twenty_kills_spread_over_training_and_saving(tiny, tiny_runs, monkeypatch):
    """Kill training with kill -9 at twenty random moments, half of them while files are written.

    Each time the same command continues, at most the steps since the last checkpoint are lost, and
    the final files equal those of an uninterrupted run.
    """
    name, random, kills, saving = "tiny-joint", np.random.default_rng(0), 0, 0
    shutil.rmtree(tiny / name)
    while kills < 20:
        before = Run.open(name).step if (tiny / name / "config.json").exists() else 0
        if before == 24:  # the run has finished before the twentieth kill: train it again
            assert_same_run(tiny / name, tiny_runs / name)
            shutil.rmtree(tiny / name)
            continue
        process, target = gear_train(name), tiny / name / "checkpoints"
        while process.poll() is None and not (
            target.exists() and (wait_for(kills, target, before) or time.sleep(0.001))
        ):
            pass
        if kills % 2:
            time.sleep(random.uniform(0, 0.25))
        in_a_save = any(target.glob(".*.tmp")) if target.exists() else False
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills, saving = kills + 1, saving + in_a_save
        assert Run.open(name).step >= before  # no checkpoint is lost
    assert saving >= 5, "too few kills happened during a save to test it"
    assert gear_train(name).wait() == 0
    assert_same_run(tiny / name, tiny_runs / name)


def wait_for(kills, checkpoints, before):
    """Tell whether to kill now: for every even kill during a save, for every odd kill once a
    checkpoint exists.
    """
    if kills % 2 == 0:
        return any(checkpoints.glob(".*.tmp"))
    return any(checkpoints.glob("[0-9]*"))


def test_a_run_is_a_function_of_its_config(tiny_runs):
    train(recipe("tiny-tokenizer"), "tiny-tokenizer", QUIET)
    assert_same_run(Run.open("tiny-tokenizer").path, tiny_runs / "tiny-tokenizer")


def test_a_finished_run_is_left_alone(tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*") if p.is_file()}
    train(resolved("tiny"), "tiny", QUIET)
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*") if p.is_file()} == before


def resolved(name):
    """Return the Config with which a run was trained."""
    values = Run.open(name).config
    del values["version"]
    return from_dict(Config, values)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(monkeypatch):
    calls = []

    def sick(reconstruction, images):
        calls.append(1)
        return (reconstruction - images).abs().mean() / (0.0 if len(calls) == 9 else 1.0)

    monkeypatch.setattr("gear.training.objectives.reconstruction_loss", sick)
    with pytest.raises(
        TrainingStopped,
        match=r"'recon_loss' of the tokenizer is inf at step 8. The state of step 6 is saved",
    ):
        train(recipe("tiny-tokenizer"), "sick", QUIET)
    run = Run.open("sick")
    assert run.checkpoint_steps() == [6] and all(
        torch.isfinite(t).all() for t in run.load_checkpoint("networks").values()
    )


def test_steps_that_are_not_finite_are_skipped_up_to_the_allowed_number(monkeypatch, capsys):
    """No network changes in a skipped step; more skipped steps in a row than allowed stop the run."""
    calls = []

    def sick(reconstruction, images):
        calls.append(1)
        return (reconstruction - images).abs().mean() / (0.0 if len(calls) in (9, 10) else 1.0)

    monkeypatch.setattr("gear.training.objectives.reconstruction_loss", sick)
    train(recipe("tiny-tokenizer"), "sick", replace(QUIET, skip=2))
    messages = capsys.readouterr().err
    assert (
        "skipped: 'recon_loss' of the tokenizer is inf at step 8" in messages
        and "at step 9" in messages
    )
    run = Run.open("sick")
    assert run.is_finished and all(
        torch.isfinite(t).all() for t in run.load_checkpoint("networks").values()
    )
    assert run.load_checkpoint("optimizers")["tokenizer.0.step"] == 22
    calls.clear()
    with pytest.raises(TrainingStopped, match="is inf at step 9"):
        train(recipe("tiny-tokenizer"), "sicker", replace(QUIET, skip=1))


def test_a_run_saved_at_a_skipped_step_goes_on(monkeypatch):
    """A skipped step has a line in metrics.jsonl, which resuming requires, and the count of
    consecutive skipped steps is restored.
    """
    sick = lambda reconstruction, images: (reconstruction - images).abs().mean() / 0.0
    config = replace(recipe("tiny-tokenizer"), steps=8, save_every=6)
    with monkeypatch.context() as patch:
        calls, healthy = [], objectives.reconstruction_loss
        loss = lambda *images: (calls.append(1), sick if len(calls) > 5 else healthy)[1](*images)
        patch.setattr(objectives, "reconstruction_loss", loss)
        with pytest.raises(TrainingStopped, match="is inf at step 7. The state of step 6 is saved"):
            train(config, "kept", replace(QUIET, skip=2))
    run = Run.open("kept")
    assert run.metrics().set_index("step").skipped[6] == 1 and run.load_state()["skipped"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "reconstruction_loss", sick)
        with pytest.raises(TrainingStopped, match="is inf at step 7"):
            train(config, "kept", replace(QUIET, skip=2))
    train(config, "kept", QUIET)
    assert Run.open("kept").is_finished


def test_a_collapsing_codebook_gives_a_warning(monkeypatch, capsys):
    config = replace(recipe("tiny-tokenizer"), steps=8, eval_every=4)
    train(config, "well", QUIET)
    assert "collapsing" not in capsys.readouterr().err

    def collapsed(self, original=validate.Validation.__call__):
        metrics = original(self)
        return metrics | {
            "val/usage_size": metrics["val/usage_size"] * (0.4 if self.state.step else 1)
        }

    monkeypatch.setattr("gear.training.loop.Validation.__call__", collapsed)
    train(config, "ill", QUIET)
    assert (
        "run 'ill': the codebook is collapsing. At step 4 validation images use"
        in capsys.readouterr().err
    )
    joint = replace(recipe("tiny-joint"), steps=4, eval_every=4, tokenizer_run="")
    train(replace(joint, objective=replace(joint.objective, bridge="naive")), "naive", QUIET)
    assert "the generator's own loss reaches the tokenizer" in capsys.readouterr().err


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_says_what_would_fit(error, monkeypatch):
    def hungry(reconstruction, images):
        raise error

    monkeypatch.setattr("gear.training.objectives.reconstruction_loss", hungry)
    message = (
        r"not enough memory for 8 images at once.*--accumulate 4 \(4 at once\) and --checkpointing"
    )
    with pytest.raises(TrainingStopped, match=message):
        train(recipe("tiny-tokenizer"), "hungry", replace(QUIET, accumulate=2))


def test_the_newest_checkpoints_and_the_best_are_kept(monkeypatch):
    """The best checkpoint has the lowest next-token loss on validation images or, without a
    generator, the highest PSNR.
    """
    config = replace(recipe("tiny-tokenizer"), steps=24, eval_every=4, save_every=4)

    def rated(self, original=validate.Validation.__call__):
        return original(self) | {"val/psnr": 9.0 if self.state.step == 8 else 1.0}

    monkeypatch.setattr("gear.training.loop.Validation.__call__", rated)
    train(config, "kept", replace(QUIET, keep=3))
    run = Run.open("kept")
    assert run.checkpoint_steps() == [8, 16, 20, 24] and run.best_step == 8 and run.step == 24


def test_tensorboard_gets_the_lines_of_metrics(tmp_path):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(
        replace(recipe("tiny-tokenizer"), steps=4, eval_every=4),
        "board",
        replace(QUIET, tensorboard=True),
    )
    run = Run.open("board")
    events = board.EventAccumulator(str(run.path / "tensorboard")).Reload()
    scalars = {e.step: e.value for e in events.Scalars("recon_loss")}
    logged = run.metrics().dropna(subset="recon_loss")
    assert (
        scalars == pytest.approx(dict(zip(logged.step, logged.recon_loss)), rel=1e-6)
        and len(scalars) == 4
    )


def test_last_logged_validation_is_that_of_the_saved_weights(tiny):
    """The last logged PSNR is that of the averaged tokenizer in the checkpoint."""
    run = Run.open("tiny-tokenizer")
    images, _ = load(recipe("tiny-tokenizer").data, "val", 96)
    metrics, _ = tokenizer_metrics(load_tokenizer("tiny-tokenizer"), images, tau=0.02)
    assert metrics["val/psnr"] == pytest.approx(run.metrics().iloc[-1]["val/psnr"], abs=1e-9)


@pytest.mark.parametrize("name, passes_per_validation", (("tiny-joint", [1, 2]), ("tiny", [1, 1])))
def test_validation_encodes_an_image_once_for_each_tokenizer(
    name, passes_per_validation, tiny, monkeypatch
):
    """The generator is measured on the indices that the tokenizer's metrics computed, and a frozen
    tokenizer is measured only once.
    """
    state = State(resolved(name), torch.device("cpu"))
    validation, counts = validate.Validation(state), []
    tokenizer = (
        state.averages["tokenizer"].module if "tokenizer" in state.averages else state.tokenizer
    )
    latents = tokenizer.latents
    monkeypatch.setattr(
        tokenizer,
        "latents",
        lambda images, *check: counts.append(len(images)) or latents(images, *check),
    )
    for passes in passes_per_validation:
        metrics = validation()
        assert sum(counts) == passes * len(validation.images)
    monkeypatch.undo()
    indices = tokenizer.encode(validation.images).flatten(1)
    inputs = indices, validation.labels, validation.target
    generator_metrics = validate.generator_metrics(
        state.averages["generator"].module, state.projector, *inputs
    )
    assert generator_metrics.items() <= metrics.items() and "val/psnr" in metrics


def test_a_run_whose_weights_are_gone_is_trained_again(tiny, tiny_runs):
    shutil.rmtree(tiny / "tiny" / "checkpoints")
    train(resolved("tiny"), "tiny", QUIET)
    assert_same_run(tiny / "tiny", tiny_runs / "tiny")


def test_a_parent_must_be_finished(tiny):
    shutil.rmtree(tiny / "tiny-joint" / "checkpoints" / "0000024")
    with pytest.raises(UserError, match="parent 'tiny-joint' is at step 18 of 24"):
        train(resolved("tiny"), "child", QUIET)
    assert not (tiny / "child").exists()


def test_resuming_does_not_change_the_perceptual_term(tiny, monkeypatch):
    """If LPIPS's weights were added since the run began, resuming would change the objective."""
    config = replace(
        resolved("tiny-tokenizer"),
        objective=replace(resolved("tiny-tokenizer").objective, lpips_weight=0.1),
    )
    monkeypatch.setattr("gear.training.state.load_lpips", lambda *_: None)
    train(config, "without", QUIET)
    assert Run.open("without").metrics().iloc[0]["lpips_weight"] == 0
    shutil.rmtree(tiny / "without" / "checkpoints" / "0000024")
    monkeypatch.setattr(
        "gear.training.state.load_lpips", lambda *_: lambda x, y: (x - y).abs().mean()
    )
    with pytest.raises(
        UserError, match="began with a perceptual weight of 0.0 and would go on with 0.1"
    ):
        train(config, "without", QUIET)


def test_joint_starts_from_its_parent(tiny):
    """At step 0 of the joint stage, validation measures the warm-up's averaged tokenizer."""
    joint, parent = (
        Run.open("tiny-joint").metrics().iloc[0],
        Run.open("tiny-tokenizer").metrics().iloc[-1],
    )
    assert (
        joint["val/psnr"] == parent["val/psnr"]
        and joint["val/usage_entropy"] == parent["val/usage_entropy"]
    )


def test_generator_stage_keeps_the_tokenizer(tiny):
    child = Run.open("tiny").load_checkpoint("networks")
    parent = Run.open("tiny-joint").load_checkpoint("networks")
    names = [n for n in parent if n.startswith("tokenizer_ema.")]
    assert names and all(
        torch.equal(parent[n], child[n.replace("tokenizer_ema.", "tokenizer.")]) for n in names
    )


@pytest.mark.parametrize("at", (0, 16))
def test_a_validation_metric_that_is_no_number_stops_the_run(at, home, monkeypatch):
    """Nothing of that step is logged, and once the cause is removed, the same command continues
    from the checkpoint.
    """
    original = validate.Validation.__call__

    def sick(self):
        return original(self) | ({"val/psnr": float("nan")} if self.state.step == at else {})

    config = recipe("tiny-tokenizer")
    assert config.save_every < 16 and 16 % config.eval_every == 0
    with monkeypatch.context() as patch:
        patch.setattr(validate.Validation, "__call__", sick)
        with pytest.raises(
            TrainingStopped,
            match=f"'val/psnr' is nan at step {at}.*{'is saved' if at else 'Nothing was saved'}",
        ):
            train(config, "sick", QUIET)
    run = Run(home / "runs" / "sick")
    assert "NaN" not in "".join(path.read_text() for path in run.path.glob("metrics.jsonl"))
    assert run.logged_step == max(at - 1, 0)
    train(config, "sick", QUIET)
    train(config, "well", QUIET)
    assert_same_run(run.path, home / "runs" / "well")
