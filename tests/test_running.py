"""A step that is compiled or graphed, and what happens where it cannot be."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_state

from gear import data
from gear.config import UserError
from gear.data import DataConfig
from gear.recipes import TINY, recipe
from gear.training import running
from gear.training.objectives import gradients
from gear.training.running import Running, upload, way_of
from gear.training.state import step_seed

CPU = torch.device("cpu")


@pytest.fixture
def samples():
    """Sixteen scenes as a stream gives them."""
    return next(data.stream(DataConfig(image_size=16, train_images=64), seed=0, batch_size=16))


@pytest.fixture(autouse=True)
def stance():
    yield
    torch.compiler.set_stance("default")


def placed(device="cuda", size=32, batch=32, parts=1, world=1, shard=False):
    config = replace(TINY, batch_size=batch, data=replace(TINY.data, image_size=size))
    processes = SimpleNamespace(world=world, shard=shard)
    return SimpleNamespace(device=torch.device(device), config=config, parts=parts, processes=processes)


@pytest.mark.parametrize(
    "state, options, way",
    [
        (placed("cpu"), {}, "plain"),
        (placed("cpu"), {"compiled": True}, "compiled"),
        (placed(), {}, "graphed"),
        (placed(size=128, batch=32), {}, "graphed"),
        (placed(size=256), {}, "compiled"),
        (placed(parts=4), {}, "compiled"),
        (placed(world=2), {}, "compiled"),
        (placed(world=2, shard=True), {}, "plain"),
        (placed(), {"compiled": True}, "compiled"),
        (placed(), {"eager": True}, "plain"),
        (placed(size=256), {"eager": True}, "plain"),
    ],
)
def test_a_gpu_compiles_large_steps_and_graphs_small_ones(state, options, way):
    assert way_of(state, **options) == way


@pytest.mark.parametrize("name, way", [("scenes-joint", "graphed"), ("cifar10-joint", "graphed"), ("tiny", "graphed"),
                                       ("imagenet256-b-joint", "compiled"), ("imagenet256-l-gear", "compiled")])  # fmt: skip
def test_presets_are_small_or_large(name, way):
    config = recipe(name)
    assert way_of(placed(size=config.data.image_size, batch=config.batch_size)) == way


def test_uploaded_images_are_floats(samples):
    images, labels = upload(samples, CPU)
    assert samples[0].dtype == torch.uint8 and samples[0].shape == (16, 16, 16, 3)
    assert torch.equal(images, data.to_float(samples[0])) and torch.equal(labels, samples[1])
    codes = torch.empty(16, 0), samples[1], torch.zeros(16, 4)
    assert all(a is b for a, b in zip(upload(codes, CPU), codes))  # what is looked up stays as it is


def descended(state, samples, compute):
    """Take a step with `compute` for its gradients: its losses, and the weights after it."""
    torch.manual_seed(step_seed(state.config.seed, state.step))
    compute(upload(samples, CPU))
    losses = state.descend()
    weights = [p.detach().clone() for network in state.networks.values() for p in network.parameters()]
    return {name: value.item() for name, value in losses.items()}, weights


@pytest.mark.parametrize("way", ("compiled", "graphed"))
def test_what_cannot_be_compiled_or_graphed_is_computed_plainly(way, samples, monkeypatch, capsys):
    """Half of the gradients are there when it fails, and random numbers are drawn: neither may be seen."""
    plain = tiny_state()
    expected = descended(plain, samples, lambda uploaded: gradients(plain, uploaded))

    def failing(state, uploaded):
        weight = next(state.networks["tokenizer"].parameters())
        weight.grad = torch.ones_like(weight)
        torch.rand(7)
        raise RuntimeError("no compiler\nwith a long story")

    state, calls = tiny_state(), []
    monkeypatch.setattr(running, "compile_networks", lambda _: calls.append("compile"))
    compute = Running(state, way)
    with monkeypatch.context() as patch:
        if way == "compiled":
            patch.setattr(running, "gradients", lambda *a: failing(*a) if compute.way == way else gradients(*a))
        else:
            patch.setattr(running, "Graph", failing)
        losses, weights = descended(state, samples, compute)
    assert losses == expected[0] and all(map(torch.equal, weights, expected[1]))
    said = capsys.readouterr().err
    assert said == f"steps cannot be {way} here, and are computed plainly: no compiler\n"
    state.finish_step()
    descended(state, samples, compute)
    assert not capsys.readouterr().err and calls == ["compile"] * (way == "compiled")


@pytest.mark.parametrize("error", (UserError("an image"), torch.OutOfMemoryError("full")))
def test_what_another_way_would_not_mend_is_raised(error, samples, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr(running, "gradients", failing)
    monkeypatch.setattr(running, "compile_networks", lambda _: None)
    with pytest.raises(type(error)):
        Running(tiny_state(), "compiled")(upload(samples, CPU))


class Recorded:
    """What a Graph is to `Running`: it says for which state of the adversarial term it was captured."""

    made = []

    def __init__(self, state, _):
        self.state = state
        self.made.append(state.gan_is_on)

    def replay(self, uploaded):
        gradients(self.state, uploaded)


def test_the_adversarial_term_has_a_graph_of_its_own(samples, monkeypatch):
    monkeypatch.setattr(running, "Graph", Recorded)
    state = tiny_state(steps=4, gan_start=0.5)
    compute = Running(state, "graphed")
    for _ in range(4):
        descended(state, samples, compute)
        state.finish_step()
    assert Recorded.made == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ("joint", "tokenizer"))
def test_a_compiled_step_is_the_plain_one(stage, samples):
    """But for dropout, which compiled code draws in its own way."""
    plain, compiled = tiny_state(stage), tiny_state(stage)
    for module in (m for state in (plain, compiled) for n in state.networks.values() for m in n.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected, _ = descended(plain, samples, lambda uploaded: gradients(plain, uploaded))
    losses, _ = descended(compiled, samples, Running(compiled, "compiled"))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert compiled.is_compiled
