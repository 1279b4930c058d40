"""A killed run ends with the bytes of an uninterrupted one; a sick one stops and keeps its last good state."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from gear import load_tokenizer
from gear.config import TrainingStopped, from_dict
from gear.data import load
from gear.recipes import recipe
from gear.run import Run
from gear.training.loop import Runtime, train
from gear.training.state import Config
from gear.training.validate import tokenizer_metrics

QUIET = Runtime(device="cpu", quiet=True)


def gear_train(name):
    command = [sys.executable, "-m", "gear", "train", name, "--quiet", "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after_checkpoint(name, runs, step):
    """Start training and kill -9 it once the checkpoint of `step` is there; returns the checkpoints it left."""
    process = gear_train(name)
    deadline = time.time() + 120
    while not (runs / name / "checkpoints" / f"{step:07d}").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.003)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return Run.open(name).checkpoint_steps()


def assert_same_run(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for file in ("networks.safetensors", "optimizers.safetensors", "state.json"):
        newest = sorted((one / "checkpoints").glob("0*"))[-1].name
        assert (one / "checkpoints" / newest / file).read_bytes() == (other / "checkpoints" / newest / file).read_bytes()


@pytest.mark.parametrize("name", ["tiny-joint", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiny-tokenizer", "tiny"))])
def test_kill_9_then_the_same_command_gives_the_same_bytes(name, tiny, tiny_runs):
    (tiny / name).rename(tiny / "whole")
    left = kill_after_checkpoint(name, tiny, step=6)
    assert left and left[-1] < 24, "the kill came too late to test anything"
    assert gear_train(name).wait() == 0
    assert_same_run(tiny / name, tiny_runs / name)


def test_a_run_is_a_function_of_its_config(tiny_runs):
    train(recipe("tiny-tokenizer"), "tiny-tokenizer", QUIET)
    assert_same_run(Run.open("tiny-tokenizer").path, tiny_runs / "tiny-tokenizer")


def test_a_finished_run_is_left_alone(tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*") if p.is_file()}
    train(resolved("tiny"), "tiny", QUIET)
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*") if p.is_file()} == before


def resolved(name):
    """Return the Config a run was trained with."""
    values = Run.open(name).config
    del values["version"]
    return from_dict(Config, values)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state():
    config = recipe("tiny-tokenizer")
    config = replace(config, save_every=1, optimizer=replace(config.optimizer, tokenizer_lr=1e18))
    with pytest.raises(TrainingStopped, match=r"'\w+_loss' of the \w+ is (nan|inf|-inf) at step \d+.*state of step \d+ stands"):
        train(config, "sick", QUIET)
    run = Run.open("sick")
    assert run.checkpoint_steps() and not run.is_finished
    run.load_checkpoint("networks")


def test_last_logged_validation_is_that_of_the_saved_weights(tiny):
    """The logged PSNR is the one the checkpoint's averaged tokenizer has."""
    run = Run.open("tiny-tokenizer")
    images, _ = load(recipe("tiny-tokenizer").data, "val", 96)
    again = tokenizer_metrics(load_tokenizer("tiny-tokenizer"), images, tau=0.02)
    assert again["val/psnr"] == pytest.approx(run.metrics().iloc[-1]["val/psnr"], abs=1e-9)


def test_metrics_hold_no_wall_clock(tiny):
    for name in ("tiny-tokenizer", "tiny-joint", "tiny"):
        assert not [c for c in Run.open(name).metrics() if "second" in c or "time" in c]


def test_joint_starts_from_its_parent(tiny):
    """Step 0 of the joint stage measures the warm-up's averaged tokenizer."""
    joint, parent = Run.open("tiny-joint").metrics().iloc[0], Run.open("tiny-tokenizer").metrics().iloc[-1]
    assert joint["val/psnr"] == parent["val/psnr"] and joint["val/usage_entropy"] == parent["val/usage_entropy"]


def test_generator_stage_keeps_the_tokenizer(tiny):
    ours = Run.open("tiny").load_checkpoint("networks")
    parent = Run.open("tiny-joint").load_checkpoint("networks")
    names = [n for n in parent if n.startswith("tokenizer_ema.")]
    assert names and all(torch.equal(parent[n], ours[n.replace("tokenizer_ema.", "tokenizer.")]) for n in names)
