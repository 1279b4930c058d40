"""Execution modes of a step (plain, compiled, graphed), and the fallback to plain mode."""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_state

from gear import data
from gear.config import UserError
from gear.cost import price
from gear.data import DataConfig
from gear.data.stream import upload
from gear.device import capturing
from gear.experiments import recipes
from gear.experiments.recipes import TINY, in_parts, recipe
from gear.runs.run import Run
from gear.training import loop, running
from gear.training.loop import Runtime
from gear.training.running import Ahead, Running, compile_networks, way_of
from gear.training.stages import gradients
from gear.training.state import State, step_seed

CPU = torch.device("cpu")


@pytest.fixture
def samples():
    """A batch of sixteen scenes from a stream."""
    return next(data.stream(DataConfig(image_size=16, train_images=64), seed=0, batch_size=16))


def placed(device="cuda", size=32, batch=32, is_alone=True):
    """Return the arguments of `way_of` except its Runtime."""
    config = replace(TINY, batch_size=batch, data=replace(TINY.data, image_size=size))
    return config, torch.device(device), is_alone


@pytest.mark.parametrize(
    "arguments, options, mode",
    [
        (placed("cpu"), {}, "plain"),
        (placed("cpu"), {"compile": True}, "compiled"),
        (placed(), {}, "graphed"),
        (placed(size=128, batch=32), {}, "graphed"),
        (placed(size=256), {}, "compiled"),
        (placed(is_alone=False), {}, "compiled"),
        (placed(is_alone=False), {"fsdp": True}, "plain"),
        (placed(), {"compile": True}, "compiled"),
        (placed(), {"eager": True}, "plain"),
        (placed(size=256), {"eager": True}, "plain"),
    ],
)
def test_a_gpu_compiles_large_steps_and_graphs_small_ones(arguments, options, mode):
    config, device, is_alone = arguments
    assert way_of(config, device, Runtime(**options), is_alone) == mode


@pytest.mark.parametrize(
    "name, mode",
    [
        ("scenes-joint", "graphed"),
        ("cifar10-joint", "graphed"),
        ("tiny", "graphed"),
        ("imagenet256-b-joint", "compiled"),
        ("imagenet256-l-gear", "compiled"),
    ],
)
def test_presets_are_small_or_large(name, mode):
    assert way_of(recipe(name), torch.device("cuda"), Runtime(), is_alone=True) == mode


def test_uploaded_images_are_floats(samples):
    images, labels = upload(samples, CPU)
    assert samples[0].dtype == torch.uint8 and samples[0].shape == (16, 16, 16, 3)
    assert torch.equal(images, data.to_float(samples[0])) and torch.equal(labels, samples[1])
    codes = torch.empty(16, 0), samples[1], torch.zeros(16, 4)
    assert all(
        a is b for a, b in zip(upload(codes, CPU), codes)
    )  # samples from the cache are not converted


def descended(state, samples, compute):
    """Take a step whose gradients `compute` computes; returns the losses and the new weights."""
    torch.manual_seed(step_seed(state.config.seed, state.step))
    compute(upload(samples, CPU))
    losses = state.descend()
    weights = [
        p.detach().clone() for network in state.networks.values() for p in network.parameters()
    ]
    return {name: value.item() for name, value in losses.items()}, weights


@pytest.mark.parametrize("mode", ("compiled", "graphed"))
def test_what_cannot_be_compiled_or_graphed_is_computed_plainly(mode, samples, monkeypatch, capsys):
    """The failing attempt leaves gradients and draws random numbers; neither may affect the plain
    step.
    """
    plain = tiny_state()
    expected = descended(plain, samples, lambda uploaded: gradients(plain, uploaded))

    def failing(state, uploaded):
        weight = next(state.networks["tokenizer"].parameters())
        weight.grad = torch.ones_like(weight)
        torch.rand(7)
        raise RuntimeError("no compiler\nwith a long story")

    state, calls = tiny_state(), []
    monkeypatch.setattr(running, "compile_networks", lambda _: calls.append("compile") or [])
    compute = Running(state, mode)
    with monkeypatch.context() as patch:
        if mode == "compiled":
            patch.setattr(
                running,
                "gradients",
                lambda *a: failing(*a) if compute.mode == mode else gradients(*a),
            )
        else:
            patch.setattr(running, "Graph", failing)
        losses, weights = descended(state, samples, compute)
    assert losses == expected[0] and all(map(torch.equal, weights, expected[1]))
    message = capsys.readouterr().err
    assert message == f"steps cannot be {mode} here and run in plain mode instead: no compiler\n"
    state.finish_step()
    descended(state, samples, compute)
    assert not capsys.readouterr().err and calls == ["compile"] * (mode == "compiled")


@pytest.mark.parametrize("error", (UserError("an image"), torch.OutOfMemoryError("full")))
def test_errors_that_plain_mode_would_not_avoid_are_raised(error, samples, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr(running, "gradients", failing)
    monkeypatch.setattr(running, "compile_networks", lambda _: [])
    with pytest.raises(type(error)):
        Running(tiny_state(), "compiled")(upload(samples, CPU))


class Recorded:
    """A stand-in for Graph that records whether the adversarial term was on at its capture."""

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
    """Dropout is switched off, because compiled code draws it differently."""
    plain, compiled = tiny_state(stage), tiny_state(stage)
    for module in (
        m for state in (plain, compiled) for n in state.networks.values() for m in n.modules()
    ):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected, _ = descended(plain, samples, lambda uploaded: gradients(plain, uploaded))
    losses, _ = descended(compiled, samples, Running(compiled, "compiled"))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert compiled.is_compiled


def test_a_fallback_affects_one_run_only(samples):
    """The next run in the same process is compiled again."""
    state = tiny_state()
    compute = Running(state, "compiled")
    parts = compute.compiled
    assert state.networks["tokenizer"] in parts and state.is_compiled
    assert all(part._compiled_call_impl is not None for part in parts)
    compute._fall_back(RuntimeError("no compiler"))
    assert all(part._compiled_call_impl is None for part in parts) and not state.is_compiled
    assert Running(state, "compiled").mode == "compiled" and state.is_compiled


def test_a_frozen_tokenizer_is_not_compiled(tiny):
    """It has to encode as at inference."""
    state = State(recipe("tiny"), CPU)
    parts = compile_networks(state)
    tokenizer = state.networks["tokenizer"]
    assert set(parts) == {*state.networks["generator"].blocks, state.teacher_features}
    assert all(module._compiled_call_impl is None for module in tokenizer.modules())


def test_the_next_item_is_fetched_early_and_its_error_is_raised_when_taken():
    def items():
        yield 1
        yield 2
        raise UserError("an image that cannot be read")

    ahead = Ahead(items())
    assert ahead.take() == 1
    ahead.fetch()
    assert ahead.take() == 2
    ahead.fetch()  # the error belongs to the next step
    with pytest.raises(UserError, match="an image that cannot be read"):
        ahead.take()
    assert Ahead(iter(())).take() is None


def test_a_step_whose_next_images_cannot_be_read_is_saved(tiny, monkeypatch):
    monkeypatch.setattr(loop, "upload", broken_after(3))
    config = replace(recipe("tiny-tokenizer"), steps=8, save_every=3, log_every=1)
    with pytest.raises(UserError, match="cannot be read"):
        loop.train(config, "broken", Runtime(device="cpu", quiet=True))
    assert Run.open("broken").checkpoint_steps() == [3] and Run.open("broken").logged_step == 3


def broken_after(count):
    numbers = itertools.count()

    def upload_some(uploaded, device):
        if next(numbers) == count:
            raise UserError("an image cannot be read")
        return upload(uploaded, device)

    return upload_some


class Capture:
    """A stand-in for torch.cuda as used by `capturing`; streams and generator states are names."""

    def __init__(self, monkeypatch, error=None):
        self.stream, self.states, self.error = "own", [], error
        fresh = SimpleNamespace(graphsafe_get_state=lambda: "fresh")
        monkeypatch.setattr(torch, "Generator", lambda device: fresh)
        generator = SimpleNamespace(graphsafe_set_state=self.states.append)
        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 1,
            "current_stream": lambda: self.stream,
            "set_stream": self.set_stream,
            "Stream": lambda device: "aside",
            "graph": self.graph,
            "default_generators": [None, generator],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_stream(self, stream):
        self.stream = stream

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.stream = stream
        yield
        if self.error:
            raise self.error  # as if the driver had invalidated the capture: the stream is not restored
        self.stream = "own"


def test_a_capture_that_fails_leaves_the_process_as_it_was(monkeypatch):
    capture = Capture(monkeypatch, RuntimeError("invalidated"))
    with (
        pytest.raises(RuntimeError, match="invalidated"),
        capturing("graph", torch.device("cuda:1")),
    ):
        assert capture.stream == "aside"
    assert capture.stream == "own" and capture.states == ["fresh"]


def test_a_capture_that_succeeds_leaves_the_generator_alone(monkeypatch):
    capture = Capture(monkeypatch)
    with capturing("graph", torch.device("cuda:1")):
        assert capture.stream == "aside"
    assert capture.stream == "own" and capture.states == []


def test_parts_are_counted_for_the_empty_gpu(monkeypatch):
    """Every process gets the same number, whatever else uses the GPU; on a CPU it is one."""
    config, cuda = recipe("imagenet256-b-joint"), torch.device("cuda")
    card = SimpleNamespace(total_memory=70e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    parts_of = lambda **options: in_parts(config, "untrained", Runtime(**options)).accumulate  # noqa: E731
    assert parts_of(accumulate=3) == 3
    assert parts_of(accumulate="auto", device="cpu") == 1
    monkeypatch.setattr(recipes, "find_device", lambda name: cuda)
    parts = parts_of(accumulate="auto")
    assert parts == price.parts_that_fit(config, 256, 70e9, is_compiled=True) and parts > 1
    assert parts_of(accumulate="auto", eager=True) > parts
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parts_of(accumulate="auto") == price.parts_that_fit(config, 128, 70e9, is_compiled=True)
    with pytest.raises(
        UserError, match="--accumulate auto counts a whole generator: with --fsdp, give a number"
    ):
        parts_of(accumulate="auto", fsdp=True)
    with pytest.raises(UserError, match="accumulate is 'auto'"):
        loop.train(config, runtime=Runtime(accumulate="auto", device="cpu"))
