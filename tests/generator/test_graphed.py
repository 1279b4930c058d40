"""When graphs are captured, tested with a stand-in for Graph; and, on a GPU, that a captured
sampling loop gives the results of the loop itself.
"""

import gc
import weakref

import pytest
import torch
from helpers import tiny_generator
from torch import nn

from gear.files import say_once
from gear.generator import graphed, sampling
from gear.generator.sampling import generate

LABELS = torch.tensor([0, 3, 4])


def scaled(scale, network, x, y, rng):
    """A function as `graphed` runs them: with settings, a network, an input that may be None, and
    random numbers.
    """
    x = x if y is None else x + y
    return scale * network(x), torch.rand(3, generator=rng, device=x.device)


@pytest.fixture
def captured(monkeypatch):
    """Replace Graph by a stand-in that calls its function again; returns the settings of the
    stand-ins made.
    """
    made = []

    class StandIn:
        def __init__(self, *arguments):
            self.function, self.settings, _, self.dtype, _ = arguments
            made.append(self.settings)

        def __call__(self, network, inputs, seed):
            return graphed.launched(self.function, self.settings, network, self.dtype, inputs, seed)

    monkeypatch.setattr(graphed, "Graph", StandIn)
    return made


def ask(network, settings=2.0, x=torch.ones(1, 2), y=None, seed=0, dtype=torch.float32):
    return graphed.repeated(scaled, settings, network, dtype, (x, y), seed)


def test_the_second_call_of_a_kind_is_captured_and_every_later_one_replayed(captured):
    network = nn.Linear(2, 2)
    ask(network)
    assert captured == []
    for seed in (1, 2, 3):
        ask(network, seed=seed, x=torch.zeros(1, 2))
    assert captured == [2.0]


@pytest.mark.parametrize("change", (
    {"settings": 3.0}, {"x": torch.ones(4, 2)}, {"y": torch.ones(1, 2)},
    {"dtype": torch.float64, "x": torch.ones(1, 2, dtype=torch.float64)},
))  # fmt: skip
def test_a_call_of_another_kind_lets_the_graph_go_and_is_captured_when_repeated(
    captured, change, monkeypatch
):
    network = nn.Linear(2, 2)
    ask(network), ask(network)
    last, graphs_alive, launch = weakref.ref(graphed._LAST[network][1]), [], graphed.launched
    monkeypatch.setattr(
        graphed, "launched", lambda *arguments: (graphs_alive.append(last()), launch(*arguments))[1]
    )
    ask(network, **change)
    assert (
        graphs_alive == [None] and len(captured) == 1
    )  # its memory is freed before the next loop runs
    ask(network, **change)
    assert captured == [2.0, change.get("settings", 2.0)]


def test_a_network_has_a_graph_of_its_own_which_goes_with_it(captured):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for network in (one, other, one, other):
        ask(network)
    assert len(captured) == 2
    gone = weakref.ref(graphed._LAST[one][1])
    del network, one
    gc.collect()
    assert gone() is None and len(graphed._LAST) == 1


def test_where_no_graph_can_be_captured_that_is_said_once_and_the_result_is_the_same(
    monkeypatch, capsys
):
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors might be "
            "reported later"
        )

    monkeypatch.setattr(graphed, "Graph", refuse)
    say_once.cache_clear()
    for network in (nn.Linear(2, 2), nn.Linear(2, 2)):
        values = [ask(network, seed=1) for _ in range(3)]
        for outputs in values[1:]:
            assert all(torch.equal(a, b) for a, b in zip(values[0], outputs))
    assert len(tried) == 2  # once per network
    why = "operation not permitted when stream is capturing"
    message = (
        f"No CUDA graph could be captured ({why}): sampling goes on without one, more slowly.\n"
    )
    assert capsys.readouterr().err == message


def test_a_function_that_fails_is_not_remembered(captured):
    network = nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ask(network, x=torch.ones(1, 3))
    assert captured == [] and network not in graphed._LAST


def test_weights_inputs_and_the_seed_decide_what_is_launched():
    network = nn.Linear(2, 2)
    x, y = torch.ones(1, 2), torch.full((1, 2), 0.5)
    value, samples = graphed.launched(scaled, 2.0, network, torch.float32, (x, y), 3)
    assert torch.equal(value, 2 * network(x + y)) and torch.equal(
        samples, torch.rand(3, generator=torch.Generator().manual_seed(3))
    )
    exact, _ = graphed.launched(scaled, 2.0, network, torch.float64, (x.double(), None), 3)
    assert (
        exact.dtype == torch.float64 and network.weight.dtype == torch.float32
    )  # a copy is converted
    assert not torch.equal(
        graphed.launched(scaled, 2.0, network, torch.float32, (x, y), 4)[1], samples
    )


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("settings", (
    {"temperature": 0}, {}, {"cfg_scale": 2.0, "cfg_interval": (3, 9)}, {"cfg_scale": 0.0}, {"top_k": 3}, {"top_p": 0.8},
))  # fmt: skip
def test_a_captured_loop_draws_what_the_loop_draws(settings):
    """The labels, the seed and the weights may differ from those at the capture."""
    generator = tiny_generator().cuda()
    for seed, labels in ((0, LABELS), (0, LABELS), (1, LABELS.flip(0)), (2, LABELS)):
        if seed == 2:
            generator.head.weight.data.neg_()
        samples = generate(generator, labels, (4, 4), seed=seed, **settings)
        assert torch.equal(
            samples, generate(generator, labels, (4, 4), seed=seed, graph=False, **settings)
        )
    assert isinstance(graphed._LAST[generator][1], graphed.Graph)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU is waited for")
def test_the_loop_waits_for_nothing():
    generator = tiny_generator().cuda()
    settings, rng = (3, 16, (2.0, 0, 9), (1.0, 3, 0.9), "causal"), torch.Generator("cuda")
    condition = torch.cat([LABELS, torch.full_like(LABELS, generator.condition.no_class)]).cuda()
    sampling._decode(settings, generator, condition, None, rng)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling._decode(settings, generator, condition, None, rng)
    finally:
        torch.cuda.set_sync_debug_mode("default")
