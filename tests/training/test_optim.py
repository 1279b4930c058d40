"""Memory formats, precisions and device waits of training."""

from dataclasses import replace

import pytest
import torch
from helpers import scenes, tiny_state

from gear.checkpoints import load_tokenizer, open_checkpoint
from gear.device import open_device, tensor_core_products
from gear.experiments.recipes import recipe
from gear.generator import model
from gear.public.containers import export
from gear.runs.run import Run
from gear.tokenizer.autoencoder import group_norm
from gear.training.loop import Runtime, train
from gear.training.optim import Optimizer
from gear.training.settings import OptimizerConfig
from gear.training.stages import STAGES
from gear.training.state import State


def test_moments_come_back_in_the_memory_format_of_their_weights():
    """With another memory format, torch steps parameters one by one, with six times as many
    launches.
    """

    def optimizer():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return network, Optimizer([network], 1e-3, OptimizerConfig())

    def step(network, first_optimizer):
        network(torch.ones(1, 4, 5, 5)).sum().backward()
        first_optimizer.step(1.0)

    network, first_optimizer = optimizer()
    step(network, first_optimizer)
    saved = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in first_optimizer.tensors().items()
    }
    restored_network, restored_optimizer = optimizer()
    restored_network.load_state_dict(network.state_dict())
    restored_optimizer.load_tensors(saved)
    for parameter in restored_optimizer.parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            assert restored_optimizer.adam.state[parameter][key].stride() == parameter.stride()
    for pair in ((network, first_optimizer), (restored_network, restored_optimizer)):
        step(*pair)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), restored_network.parameters())
    )


def test_a_group_norm_has_its_inputs_precision():
    """This holds in autocast too, so that activation bytes counted on a CPU are valid for a GPU."""
    torch.manual_seed(0)
    norm, x = group_norm(32), torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last)
    plain = torch.nn.GroupNorm(8, 32, eps=1e-6)
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16 and norm(x).dtype == torch.float32
    assert (half.float() - plain(x)).abs().max() < 0.05


@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_the_precision_says_whether_products_may_be_tf32(precision):
    open_device("cpu", precision)
    may, products = precision == "bf16", torch.backends.cuda.matmul
    assert (products.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, may)
    with tensor_core_products():
        assert products.allow_tf32 == may
    assert (
        not products.allow_tf32
    )  # the other products stay exact, because an arg-max depends on them
    open_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("bridge", ("soft", "straight_through", "naive_inputs", "naive"))
def test_the_frozen_generator_does_not_check_ranges(bridge, monkeypatch):
    """A range check in evaluation mode would make every step wait for the device."""
    state, checks = tiny_state("joint", bridge=bridge), []
    monkeypatch.setattr(model, "check_range", lambda *arguments: checks.append(arguments))
    for batch in state.batches(*scenes(16)):
        for update in STAGES["joint"].updates:
            update(state, batch)
    assert not checks
    state.descend()


@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_a_frozen_tokenizer_encodes_as_the_one_that_trained(precision, home):
    """The tokenizer gives the same indices in training, frozen in the stage `generator`, and when
    loaded from a run or a file.
    """
    images, labels = scenes(16)
    trained = replace(
        recipe("tiny-joint-no-init"), precision=precision, steps=6, save_every=6, eval_every=6
    )
    train(trained, "parent", Runtime(device="cpu", quiet=True))
    parent = State(trained, torch.device("cpu"))
    parent.restore(Run.open("parent"))
    averaged = parent.averages["tokenizer"].module
    with parent.autocast():
        indices = averaged(images).quantized.indices  # as in a training step
    child = State(
        replace(recipe("tiny"), tokenizer_run="parent", tokenizer=trained.tokenizer),
        torch.device("cpu"),
    )
    assert torch.equal(child.observe(images, labels).indices, indices)
    assert torch.equal(load_tokenizer("parent").encode(images).flatten(1), indices)
    export(open_checkpoint("parent"), home / "parent.safetensors")
    assert torch.equal(
        load_tokenizer(home / "parent.safetensors").encode(images).flatten(1), indices
    )
    assert load_tokenizer("parent").latents(images).dtype == torch.float32
