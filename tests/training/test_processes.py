"""Micro-batches and several processes give the same step as one full batch, and so do checkpointing,
compiling and sharding.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import scenes, tiny_state

from gear.checkpoints import load_generator
from gear.config import UserError
from gear.experiments.recipes import recipe
from gear.runs.run import Run
from gear.training.loop import Runtime, train
from gear.training.losses import entropy_loss
from gear.training.processes import Processes
from gear.training.stages import STAGES
from gear.training.state import State, step_seed

STEPS = 3
QUIET = Runtime(device="cpu", quiet=True)
IMAGES, LABELS = scenes(8)


def small(name, **changes):
    """Return a recipe with three logged steps; the adversarial term starts at the last one."""
    return replace(
        recipe(name),
        **dict(steps=STEPS, log_every=1, eval_every=STEPS, save_every=STEPS) | changes,
    )


def logged(run):
    """Return the logged training losses of a run: {step: {term: value}}."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        r["step"]: {k: v for k, v in r.items() if k.endswith("_loss") and not k.startswith("val/")}
        for r in lines
    }


def assert_same_losses(losses, other_losses, terms):
    assert losses.keys() == other_losses.keys() and set(losses[STEPS]) == terms
    for step in range(1, STEPS + 1):
        assert losses[step].keys() == other_losses[step].keys()
        for term in losses[step]:
            assert losses[step][term] == pytest.approx(
                other_losses[step][term], rel=1e-5, abs=1e-6
            ), (
                step,
                term,
            )


def assert_same_weights(weights, other_weights):
    initial = Run.open("tiny-tokenizer").load_checkpoint("networks")
    assert weights.keys() == other_weights.keys()
    for key, value in weights.items():
        scale = (value - initial[key]).abs().max() if key in initial else value.abs().max()
        assert (other_weights[key] - value).abs().max() <= 2e-2 * scale + 1e-6, (
            key
        )  # Adam's first steps are the signs of the gradient


TERMS = {
    "tiny-joint": {
        "recon_loss",
        "codebook_loss",
        "commit_loss",
        "entropy_loss",
        "gan_loss",
        "soft_align_loss",
        "disc_loss",
        "ntp_loss",
        "align_loss",
    },
    "tiny": {"ntp_loss", "align_loss"},
}


@pytest.mark.parametrize("name", TERMS)
def test_a_batch_in_parts_is_the_same_step(name, tiny):
    """The losses agree, including the entropy of the full batch's mean, and so do the weights.

    The seed is 2, because with seed 0 one gradient is so close to zero that rounding decides its
    sign, and with it Adam's step.
    """
    for parts in (1, 4):
        train(small(name, seed=2), f"parts-{parts}", replace(QUIET, accumulate=parts))
    assert_same_losses(*(logged(tiny / f"parts-{parts}") for parts in (1, 4)), TERMS[name])
    full, split = (Run.open(f"parts-{parts}").load_checkpoint("networks") for parts in (1, 4))
    assert_same_weights(full, split)


@pytest.mark.parametrize("quantizer", ("vq", "ibq", "lfq"))
def test_gradients_of_parts_add_up(quantizer):
    """The gradients are compared in float64, because the entropy term, with its temperature of
    0.01, magnifies rounding errors.
    """
    gradients = {}
    for parts in (1, 2, 8):
        state = tiny_state(
            tokenizer=dict(quantizer=quantizer, code_dim=6, codebook_size=64),
            batch_size=8,
            parts=parts,
        )
        for module in [*state.networks.values(), state.teacher_features]:
            module.double()
        for module in state.generator.modules():
            module.p = 0.0
        torch.manual_seed(step_seed(state.config.seed, 0))
        for batch in state.batches(IMAGES.double(), LABELS):
            for update in STAGES["joint"].updates:
                update(state, batch)
        gradients[parts] = {
            n: torch.cat([g.flatten() for g in o.gradients]) for n, o in state.optimizers.items()
        }
    for parts in (2, 8):
        for name, gradient in gradients[1].items():
            assert (gradients[parts][name] - gradient).norm() < 1e-6 * gradient.norm(), (
                parts,
                name,
            )


def test_the_entropy_is_that_of_the_whole_batch():
    """Without `Batch.global_mean`, the entropies of the micro-batches would be averaged, which
    gives another value.
    """
    state = tiny_state(batch_size=8, parts=4)
    full_batch = entropy_loss(*state.tokenizer(IMAGES).quantized.entropies)
    batches = list(state.batches(IMAGES, LABELS))
    with_mean, without_mean = (
        torch.stack(
            [entropy_loss(*b.tokenized.quantized.entropies, global_mean(b)) for b in batches]
        ).mean()
        for global_mean in (lambda b: b.global_mean, lambda b: None)
    )
    assert with_mean.item() == pytest.approx(full_batch.item(), abs=1e-5)
    assert abs(without_mean.item() - full_batch.item()) > 1e-3


def test_parts_draw_dropout_of_their_own_and_labels_of_the_batch():
    state = tiny_state(batch_size=8, parts=2)
    torch.manual_seed(seed := step_seed(state.config.seed, state.step))
    expected, dropped, next_draws = torch.rand(8), [], []
    for batch in state.batches(IMAGES, LABELS):
        dropped.append(batch.dropped)
        next_draws.append(torch.rand(3))
    assert (
        torch.equal(torch.cat(dropped), expected < state.config.generator.class_dropout)
        and seed > 0
    )
    assert not torch.equal(*next_draws)


def test_recomputing_activations_changes_no_byte(tiny):
    train(small("tiny-joint"), "kept", QUIET)
    train(small("tiny-joint"), "recomputed", replace(QUIET, checkpointing=True))
    assert (tiny / "kept" / "metrics.jsonl").read_bytes() == (
        tiny / "recomputed" / "metrics.jsonl"
    ).read_bytes()


def test_recomputing_activations_keeps_less():
    """Autograd saves fewer than half of the elements in the networks' forward passes."""

    def saved(checkpointing):
        state, sizes = tiny_state(batch_size=8, checkpointing=checkpointing), []
        state.generator.train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            state.generator.logits(
                state.generator.hidden(state.tokenizer.encode(IMAGES), LABELS, [3])[3]
            )
            state.tokenizer(IMAGES)
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.slow
def test_compiled_networks_compute_the_same(tiny):
    train(small("tiny-joint"), "eager", QUIET)
    train(small("tiny-joint"), "compiled", replace(QUIET, compile=True))
    assert_same_losses(logged(tiny / "eager"), logged(tiny / "compiled"), TERMS["tiny-joint"])


def test_bf16_trains_and_quantises_in_float32(tiny):
    """Losses stay close to those in float32, and the same latents get the same codes as in
    float32.
    """
    train(small("tiny-joint"), "float32", QUIET)
    train(small("tiny-joint", precision="bf16"), "bf16", QUIET)
    float32_losses, bf16_losses = logged(tiny / "float32"), logged(tiny / "bf16")
    assert float32_losses != bf16_losses
    for term in TERMS["tiny-joint"]:
        assert bf16_losses[STEPS][term] == pytest.approx(float32_losses[STEPS][term], abs=0.1), term
    state = State(small("tiny-joint", precision="bf16"), torch.device("cpu"))
    with state.autocast():
        trained = state.tokenizer(IMAGES).quantized.indices
    z = state.tokenizer.latents(IMAGES)
    assert torch.equal(z, z.bfloat16().float()) and not torch.equal(
        z, State(small("tiny-joint"), state.device).tokenizer.latents(IMAGES)
    )
    assert torch.equal(trained, state.tokenizer.encode(IMAGES).flatten(1))  # also outside training
    assert torch.equal(trained, state.tokenizer.quantizer.indices(z))


def torchrun(processes, *arguments):
    """Run `gear train` with these arguments, or a script, in several processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        "0",
    ]
    training = ["-m", "gear", "train", *arguments, "--quiet", "--device", "cpu", "--threads", "1"]
    command += ["--standalone", *(arguments if arguments[0].endswith(".py") else training)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_two_processes_are_one_with_twice_the_batch(name, tiny):
    """Under torchrun, over gloo, each process takes half of the rows of the batch."""
    pytest.importorskip("lightning_fabric")
    config = small(name)
    changes = ["--steps", "3", "--log-every", "1", "--eval-every", "3", "--save-every", "3"]
    train(config, "alone", QUIET)
    done = torchrun(2, name, "--name", "two", *changes)
    assert done.returncode == 0, done.stderr
    assert_same_losses(logged(tiny / "alone"), logged(tiny / "two"), TERMS[name])
    config_alone, config_two = (
        json.loads((tiny / n / "config.json").read_text()) for n in ("alone", "two")
    )
    assert config_alone == config_two
    assert len(logged(tiny / "two")) == len(
        (tiny / "two" / "metrics.jsonl").read_text().splitlines()
    )  # only one process writes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, more_options", [("tiny-joint", ["--accumulate", "2", "--checkpointing"]), ("tiny", [])]
)
def test_a_generator_spread_over_processes_is_the_same_run(name, more_options, tiny):
    """With FSDP2 over gloo, losses, weights, and the checkpoint's names and shapes are the same. A
    sharded run can be resumed in one process, and the other way round.
    """
    pytest.importorskip("lightning_fabric")
    config, runtime = small(name, save_every=1, seed=2), replace(QUIET, keep=STEPS)
    changes = [
        "--seed",
        "2",  # see test_a_batch_in_parts_is_the_same_step
        "--tokenizer-run",
        config.tokenizer_run,
        "--steps",
        "3",
        "--log-every",
        "1",
        "--eval-every",
        "3",
        "--save-every",
        "1",
        "--keep",
        "3",
        "--fsdp",
        *more_options,
    ]

    def forget_later_steps(run):
        """Remove all checkpoints except that of the first step."""
        for step in (2, 3):
            shutil.rmtree(tiny / run / "checkpoints" / f"{step:07d}")

    train(config, "alone", runtime)
    done = torchrun(2, name, "--name", "spread", *changes)
    assert done.returncode == 0, done.stderr
    expected = logged(tiny / "alone")
    assert_same_losses(expected, logged(tiny / "spread"), TERMS[name])
    alone, sharded = (Run.open(run).metrics().iloc[-1] for run in ("alone", "spread"))
    assert sharded["val/ntp_loss"] == pytest.approx(alone["val/ntp_loss"], rel=1e-5)
    for file in ("networks", "optimizers"):
        alone, sharded = (Run.open(run).load_checkpoint(file) for run in ("alone", "spread"))
        assert {k: (v.shape, v.dtype) for k, v in alone.items()} == {
            k: (v.shape, v.dtype) for k, v in sharded.items()
        }
        if file == "networks":
            assert_same_weights(alone, sharded)
            for key, value in load_generator("spread").state_dict().items():
                assert torch.equal(value, sharded[f"generator_ema.{key}"]), key

    forget_later_steps("spread")
    train(config, "spread", runtime)
    assert_same_losses(expected, logged(tiny / "spread"), TERMS[name])
    forget_later_steps("alone")
    done = torchrun(2, name, "--name", "alone", *changes)
    assert done.returncode == 0, done.stderr
    assert_same_losses(expected, logged(tiny / "alone"), TERMS[name])


@pytest.mark.slow
def test_each_process_holds_its_share_of_the_blocks(tiny):
    """Weights, averages, gradients and moments are sharded; the gradient norm is that of the full
    gradient.
    """
    pytest.importorskip("lightning_fabric")
    (tiny / "shares.py").write_text(SHARES)
    done = torchrun(2, str(tiny / "shares.py"))
    assert done.returncode == 0, done.stderr


SHARES = """
import torch
from gear.experiments.recipes import recipe
from gear.training.processes import Processes
from gear.training.state import State

processes = Processes(torch.device("cpu"), 16, shard=True)
torch.manual_seed(0)
state = State(recipe("tiny"), processes.device, processes=processes)
optimizer = state.optimizers["generator"]
images, labels = torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
for batch in state.batches(images, labels):
    hidden = state.generator.hidden(batch.indices, batch.labels, [3])[3]
    state.backward("generator", {"loss": hidden.square().mean()}, {})
gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in optimizer.gradients]
norm = torch.cat([g.flatten() for g in gradients]).norm()
for p in state.generator.blocks.parameters():
    assert p.grad.to_local().numel() * 2 == p.to_local().numel() * 2 == p.numel()
assert norm > 1e-3
torch.testing.assert_close(optimizer.clip_gradients(), norm)
optimizer.step(1.0)
state.finish_step()
for p in state.generator.blocks.parameters():
    assert optimizer.adam.state[p]["exp_avg"].to_local().numel() * 2 == p.numel()
for p in state.averages["generator"].module.blocks.parameters():
    assert p.to_local().numel() * 2 == p.numel()
"""


def test_fsdp_needs_several_processes(tiny):
    with pytest.raises(
        UserError, match="--fsdp spreads a generator .* torchrun --nproc-per-node 2"
    ):
        train(small("tiny"), "lonely", replace(QUIET, fsdp=True))
    assert not (tiny / "lonely").exists()


def test_a_batch_that_cannot_be_divided_evenly(tiny):
    with pytest.raises(
        UserError,
        match="16 images cannot be divided evenly among 1 process with 3 micro-batches each",
    ):
        train(small("tiny"), "uneven", replace(QUIET, accumulate=3))
    assert not (tiny / "uneven").exists()


def test_more_processes_than_gpus(monkeypatch):
    pytest.importorskip("lightning_fabric")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="4 processes for 1 GPUs"):
        Processes(torch.device("cuda"), 16)
