"""Every device computes the public code's outputs, the values of float64, and the values of a CPU;
and it computes the same values by every path: micro-batches, checkpointing, resuming, caches.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import Formed, no_waits, scenes, state_on, take_step, tiny_generator
from test_generator import greedy
from test_parity import assert_close, case, parity_normal, state_dict
from test_readout import by_blocks, gaussian

import gear
from gear.data import Stream
from gear.data.stream import upload
from gear.device import open_device
from gear.evaluation.evaluate import EvaluateOptions, Sampling, evaluate_run
from gear.experiments.recipes import recipe
from gear.generator import sampling
from gear.images import to_float
from gear.runs.run import Run
from gear.tokenizer.readout import Affinity
from gear.training.cached import Cached
from gear.training.loop import Runtime, train
from gear.training.state import State

pytestmark = pytest.mark.slow
IMAGES, LABELS = scenes(16)


@pytest.fixture
def device(device):
    """Each type of device of this machine, with float32 products."""
    return open_device(device)


def steps(state, count=2):
    """Take steps; returns the losses of each step as floats."""
    return [
        {name: float(value) for name, value in take_step(state, IMAGES, LABELS).items()}
        for _ in range(count)
    ]


def assert_near(steps, expected_steps, tolerance=1e-4):
    """Assert that every loss of every step agrees within `tolerance`, relative or absolute."""
    for losses, expected in zip(steps, expected_steps, strict=True):
        assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("name", ("vq16", "lfq16", "ibq16"))
def test_a_tokenizer_is_the_public_one(name, device, home):
    torch.save({"model": state_dict(name)}, home / "public.pt")
    tokenizer = gear.load_tokenizer(home / "public.pt").to(device)
    expected = {key: value.to(device) for key, value in case(name).items()}
    x = expected["x"].requires_grad_()
    indices = tokenizer.encode(x)
    assert torch.equal(indices.flatten(1), expected["indices"])
    assert_close(tokenizer.decode(indices), expected["recon"])
    embedding = torch.from_numpy(parity_normal(f"{name}.E", (16384, 16))).to(device)
    embeddings = Formed(tokenizer.affinity(x).dense).soft_readout(embedding, 0.1).flatten(0, 1)
    assert_close(embeddings, expected["soft_readout"])
    assert_close(torch.autograd.grad((embeddings * expected["P"]).sum(), x)[0], expected["grad_x"])


def test_a_generator_is_the_public_one(device, home):
    torch.save({"model": state_dict("llamagen_b")}, home / "public.pt")
    generator, expected = gear.load_generator(home / "public.pt").to(device), case("llamagen_b")
    with torch.no_grad():
        logits = generator(expected["tokens"].to(device), expected["classes"].to(device)).cpu()
    assert_close(logits[:, ::16, ::97], expected["logits"])
    assert_close(logits.logsumexp(-1), expected["logsumexp"])


@pytest.mark.parametrize(
    ("block", "count", "width"), [(2**20, 512, 64), (2**25, 4096, 1024)], ids=["2^20", "2^25"]
)
def test_blocks_are_as_float64(block, count, width, device, monkeypatch):
    """The read-out and the entropies for `count` rows and 16,384 codes, with all gradients, equal
    those in float64.
    """
    if device.type == "cpu" and count > 512:
        pytest.skip("this size takes too long in float64 on a CPU")
    leaves = [gaussian(count, 8), gaussian(16_384, 8, seed=1), gaussian(16_384, width, seed=2)]
    weights = gaussian(count, width, seed=3), gaussian(count, seed=4), gaussian(16_384, seed=5)
    results = []
    for dtype, size in ((torch.float64, None), (torch.float32, block)):
        by_blocks(monkeypatch, size)
        z, c, e = (leaf.to(device, dtype).requires_grad_() for leaf in leaves)
        affinity = Affinity(*(torch.nn.functional.normalize(x, dim=-1) for x in (z, c)), 2.0, -2.0)
        values = [affinity.soft_readout(e, 0.1), *affinity.entropies()]
        loss = sum((value * weight.to(value)).sum() for value, weight in zip(values, weights))
        results.append([*values, *torch.autograd.grad(loss, [z, c, e])])
    for exact, computed in zip(*results):
        assert computed.dtype == torch.float32
        assert float((computed - exact).detach().norm() / exact.detach().norm()) < 1e-4


def test_a_joint_step_is_that_of_a_cpu(device):
    assert_near(steps(state_on(device)), steps(state_on("cpu")))


def test_indices_in_training_are_those_of_encode_in_bf16(device):
    state = state_on(device, precision="bf16")
    indices = state.observe(IMAGES, LABELS).indices
    assert torch.equal(state.tokenizer.eval().encode(IMAGES.to(device)).flatten(1), indices)


def test_a_batch_in_four_parts_is_the_whole_one(device):
    assert_near(steps(state_on(device, parts=4)), steps(state_on(device)))


def test_recomputed_activations_change_nothing(device):
    assert_near(steps(state_on(device, checkpointing=True)), steps(state_on(device)))


def test_a_run_goes_on_as_if_nothing_had_been(device, monkeypatch):
    """Losses agree within 1e-4, and the optimizer's moments have the memory format of their
    weights, because torch is slow with any other.
    """
    config = replace(recipe("tiny-joint-no-init"), steps=6, save_every=2, eval_every=6)
    runtime, finish_step = Runtime(device=str(device), quiet=True, eager=True), State.finish_step

    def killed(state):
        finish_step(state)
        if state.step == 5:
            raise KeyboardInterrupt

    uninterrupted = train(config, "whole", runtime)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "finish_step", killed)
        train(config, "killed", runtime)
    assert Run.open("killed").step == 4
    run = train(config, "killed", runtime)
    assert_near(run.metrics().to_dict("records"), uninterrupted.metrics().to_dict("records"))
    state = State(config, device)
    state.restore(run)
    moments = [(p, s) for o in state.optimizers.values() for p, s in o.adam.state.items()]
    assert moments and all(
        s[key].stride() == p.stride() for p, s in moments for key in ("exp_avg", "exp_avg_sq")
    )


def test_codes_that_are_looked_up_are_those_that_are_computed(device, tiny):
    config = recipe("tiny")
    state, numbers = State(config, device), list(range(config.batch_size))
    _, labels, indices, _ = Cached(state, quiet=True).__getitems__(numbers)
    images, _ = Stream(config.data, config.seed).__getitems__(numbers)
    assert torch.equal(state.observe(to_float(images), labels).indices.cpu(), indices)


def test_a_step_waits_once(device, monkeypatch):
    """The one wait is for the list in `descend` that says which values are finite."""
    state = state_on(device)
    batch = upload([IMAGES, LABELS], device)
    reads = []
    tolist = torch.Tensor.tolist
    take_step(state, *batch)

    def read(tensor):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(tolist(tensor))
        torch.cuda.set_sync_debug_mode("error")
        return reads[-1]

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with no_waits(device):
        take_step(state, *batch)
    assert len(reads) == 1


def draw_tokens(generator, cfg_scale=1.0, temperature=0, **options):
    """Sample 4 x 4 tokens for each of four classes."""
    return sampling.generate(
        generator, torch.arange(4), (4, 4), cfg_scale=cfg_scale, temperature=temperature, **options
    )


@pytest.mark.parametrize("cfg_scale", (1.0, 3.0), ids=("plain", "guided"))
def test_samples_with_a_cache_are_those_of_full_forwards(device, cfg_scale):
    """With tokens sampled from Python and, on a GPU, with the graph that the second call
    captures.
    """
    generator = tiny_generator().to(device)
    expected = greedy(tiny_generator(), torch.arange(4), 4, cfg_scale)
    for graph in (False, True, True, True):
        assert torch.equal(
            draw_tokens(generator, cfg_scale, dtype=torch.float32, graph=graph).cpu(), expected
        )
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("name", ("launched", "repeated"))
def test_no_token_waits(device, name, monkeypatch):
    """Neither when sampling from Python, nor with the graph that the second call captures."""
    generator, draws = tiny_generator().to(device), getattr(sampling, name)
    for _ in range(2):
        draw_tokens(generator, 3.0, 1.0, graph=name == "repeated")

    def watched(*arguments):
        with no_waits(device):
            return draws(*arguments)

    monkeypatch.setattr(sampling, name, watched)
    draw_tokens(generator, 3.0, 1.0, graph=name == "repeated")


def test_an_evaluation_is_that_of_a_cpu(device, tiny, monkeypatch):
    monkeypatch.setattr(
        sampling, "sampling_dtype", lambda generator: torch.float32
    )  # float32 on both devices, so that they sample the same indices
    options = EvaluateOptions(
        Sampling(count=64, temperature=0), reference_count=100, both=True, quiet=True
    )
    values = []
    for name in ("cpu", str(device)):
        records = evaluate_run("tiny", replace(options, device=name))
        values.append({record["metric"]: record["value"] for record in records})
        shutil.rmtree(tiny / "tiny" / "evaluation")
    assert {"fd_scenes", "ntp_loss", "psnr"} <= values[0].keys()
    assert values[1] == pytest.approx(values[0], rel=1e-3)
