"""A batch in parts, and in processes, is the same step as the batch whole; what is switched on
beside it changes nothing.
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
    """A recipe of three steps, every one logged; the adversarial term sets in at the last."""
    return replace(
        recipe(name),
        **dict(steps=STEPS, log_every=1, eval_every=STEPS, save_every=STEPS) | changes,
    )


def logged(run):
    """Return {step: {term: value}} of what a run logged of its losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        r["step"]: {k: v for k, v in r.items() if k.endswith("_loss") and not k.startswith("val/")}
        for r in lines
    }


def assert_same_losses(one, other, terms):
    assert one.keys() == other.keys() and set(one[STEPS]) == terms
    for step in range(1, STEPS + 1):
        assert one[step].keys() == other[step].keys()
        for term in one[step]:
            assert one[step][term] == pytest.approx(other[step][term], rel=1e-5, abs=1e-6), (
                step,
                term,
            )


def assert_same_weights(one, other):
    moved = Run.open("tiny-tokenizer").load_checkpoint("networks")
    assert one.keys() == other.keys()
    for key, value in one.items():
        scale = (value - moved[key]).abs().max() if key in moved else value.abs().max()
        assert (other[key] - value).abs().max() <= 2e-2 * scale + 1e-6, (
            key
        )  # Adam's first steps are signs of the gradient


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
    """Losses, among them the entropy of the whole batch's mean, and then weights.

    With seed 0 one gradient is so near zero that rounding decides its sign, and so Adam's step.
    """
    for parts in (1, 4):
        train(small(name, seed=2), f"parts-{parts}", replace(QUIET, accumulate=parts))
    assert_same_losses(*(logged(tiny / f"parts-{parts}") for parts in (1, 4)), TERMS[name])
    one, other = (Run.open(f"parts-{parts}").load_checkpoint("networks") for parts in (1, 4))
    assert_same_weights(one, other)


@pytest.mark.parametrize("quantizer", ("vq", "ibq", "lfq"))
def test_gradients_of_parts_add_up(quantizer):
    """What the optimizers are given is the same in float64; the entropy term, at a temperature of
    .01, magnifies rounding.
    """
    got = {}
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
        got[parts] = {
            n: torch.cat([g.flatten() for g in o.gradients]) for n, o in state.optimizers.items()
        }
    for parts in (2, 8):
        for name, gradient in got[1].items():
            assert (got[parts][name] - gradient).norm() < 1e-6 * gradient.norm(), (parts, name)


def test_the_entropy_is_that_of_the_whole_batch():
    """Without what a Batch tells of the others, the parts' own entropies are averaged, which is
    another number.
    """
    state = tiny_state(batch_size=8, parts=4)
    entire = entropy_loss(*state.tokenizer(IMAGES).quantized.entropies)
    batches = list(state.batches(IMAGES, LABELS))
    parts, alone = (
        torch.stack(
            [entropy_loss(*b.tokenized.quantized.entropies, global_mean(b)) for b in batches]
        ).mean()
        for global_mean in (lambda b: b.global_mean, lambda b: None)
    )
    assert parts.item() == pytest.approx(entire.item(), abs=1e-5)
    assert abs(alone.item() - entire.item()) > 1e-3


def test_parts_draw_dropout_of_their_own_and_labels_of_the_batch():
    state = tiny_state(batch_size=8, parts=2)
    torch.manual_seed(seed := step_seed(state.config.seed, state.step))
    want, seen, after = torch.rand(8), [], []
    for batch in state.batches(IMAGES, LABELS):
        seen.append(batch.dropped)
        after.append(torch.rand(3))
    assert torch.equal(torch.cat(seen), want < state.config.generator.class_dropout) and seed > 0
    assert not torch.equal(*after)


def test_recomputing_activations_changes_no_byte(tiny):
    train(small("tiny-joint"), "kept", QUIET)
    train(small("tiny-joint"), "recomputed", replace(QUIET, checkpointing=True))
    assert (tiny / "kept" / "metrics.jsonl").read_bytes() == (
        tiny / "recomputed" / "metrics.jsonl"
    ).read_bytes()


def test_recomputing_activations_keeps_less():
    """What autograd saves in a joint step, in elements."""

    def saved(checkpointing):
        state, kept = tiny_state(batch_size=8, checkpointing=checkpointing), []
        state.generator.train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            state.generator.logits(
                state.generator.hidden(state.tokenizer.encode(IMAGES), LABELS, [3])[3]
            )
            state.tokenizer(IMAGES)
        return sum(kept)

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.slow
def test_compiled_networks_compute_the_same(tiny):
    train(small("tiny-joint"), "eager", QUIET)
    train(small("tiny-joint"), "compiled", replace(QUIET, compile=True))
    assert_same_losses(logged(tiny / "eager"), logged(tiny / "compiled"), TERMS["tiny-joint"])


def test_bf16_trains_and_quantises_in_float32(tiny):
    """Losses stay near those in float32; the codes are what the same latents have in float32."""
    train(small("tiny-joint"), "float32", QUIET)
    train(small("tiny-joint", precision="bf16"), "bf16", QUIET)
    one, other = logged(tiny / "float32"), logged(tiny / "bf16")
    assert one != other
    for term in TERMS["tiny-joint"]:
        assert other[STEPS][term] == pytest.approx(one[STEPS][term], abs=0.1), term
    state = State(small("tiny-joint", precision="bf16"), torch.device("cpu"))
    with state.autocast():
        trained = state.tokenizer(IMAGES).quantized.indices
    z = state.tokenizer.latents(IMAGES)
    assert torch.equal(z, z.bfloat16().float()) and not torch.equal(
        z, State(small("tiny-joint"), state.device).tokenizer.latents(IMAGES)
    )
    assert torch.equal(trained, state.tokenizer.encode(IMAGES).flatten(1))  # whoever asks
    assert torch.equal(trained, state.tokenizer.quantizer.indices(z))


def torchrun(processes, *arguments):
    """Run `gear train` with these arguments, or a script."""
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
    """Over gloo, under torchrun: the same command, each process half of the rows; then it resumes,
    too.
    """
    pytest.importorskip("lightning_fabric")
    config = small(name)
    changes = ["--steps", "3", "--log-every", "1", "--eval-every", "3", "--save-every", "3"]
    train(config, "alone", QUIET)
    done = torchrun(2, name, "--name", "two", *changes)
    assert done.returncode == 0, done.stderr
    assert_same_losses(logged(tiny / "alone"), logged(tiny / "two"), TERMS[name])
    one, two = (json.loads((tiny / n / "config.json").read_text()) for n in ("alone", "two"))
    assert one == two
    assert len(logged(tiny / "two")) == len(
        (tiny / "two" / "metrics.jsonl").read_text().splitlines()
    )  # one writes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, beside", [("tiny-joint", ["--accumulate", "2", "--checkpointing"]), ("tiny", [])]
)
def test_a_generator_spread_over_processes_is_the_same_run(name, beside, tiny):
    """FSDP2 over gloo: losses, a checkpoint's names and shapes, weights; it goes on whole, and a
    whole one goes on spread.
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
        *beside,
    ]

    def go_on(run):
        """Forget all but the first step."""
        for step in (2, 3):
            shutil.rmtree(tiny / run / "checkpoints" / f"{step:07d}")

    train(config, "alone", runtime)
    done = torchrun(2, name, "--name", "spread", *changes)
    assert done.returncode == 0, done.stderr
    want = logged(tiny / "alone")
    assert_same_losses(want, logged(tiny / "spread"), TERMS[name])
    one, other = (Run.open(run).metrics().iloc[-1] for run in ("alone", "spread"))
    assert other["val/ntp_loss"] == pytest.approx(one["val/ntp_loss"], rel=1e-5)
    for file in ("networks", "optimizers"):
        one, other = (Run.open(run).load_checkpoint(file) for run in ("alone", "spread"))
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
            k: (v.shape, v.dtype) for k, v in other.items()
        }
        if file == "networks":
            assert_same_weights(one, other)
            for key, value in load_generator("spread").state_dict().items():
                assert torch.equal(value, other[f"generator_ema.{key}"]), key

    go_on("spread")
    train(config, "spread", runtime)
    assert_same_losses(want, logged(tiny / "spread"), TERMS[name])
    go_on("alone")
    done = torchrun(2, name, "--name", "alone", *changes)
    assert done.returncode == 0, done.stderr
    assert_same_losses(want, logged(tiny / "alone"), TERMS[name])


@pytest.mark.slow
def test_each_process_holds_its_share_of_the_blocks(tiny):
    """Of weights, averages, gradients and moments; the norm of the gradient is that of the
    whole.
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


def test_one_process_has_nobody_to_share_a_generator_with(tiny):
    with pytest.raises(
        UserError, match="--fsdp spreads a generator .* torchrun --nproc-per-node 2"
    ):
        train(small("tiny"), "lonely", replace(QUIET, fsdp=True))
    assert not (tiny / "lonely").exists()


def test_a_batch_that_cannot_be_shared_out(tiny):
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
