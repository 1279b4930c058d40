"""What training needs of its optimizers and devices beside their results."""

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
    """Else torch steps them one by one, six times as many launches."""

    def optimizer():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return network, Optimizer([network], 1e-3, OptimizerConfig())

    def step(network, made):
        network(torch.ones(1, 4, 5, 5)).sum().backward()
        made.step(1.0)

    network, made = optimizer()
    step(network, made)
    saved = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in made.tensors().items()
    }
    other, resumed = optimizer()
    other.load_state_dict(network.state_dict())
    resumed.load_tensors(saved)
    for parameter in resumed.parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            assert resumed.adam.state[parameter][key].stride() == parameter.stride()
    for pair in ((network, made), (other, resumed)):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters()))


def test_a_group_norm_has_its_inputs_precision():
    """In autocast too, so that a CPU's count of what is kept for the gradient holds for a GPU."""
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
    assert not products.allow_tf32  # an arg-max hangs on the others
    open_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("bridge", ("soft", "straight_through", "naive_inputs", "naive"))
def test_the_frozen_generator_is_not_asked_for_ranges(bridge, monkeypatch):
    """It is in evaluation mode, and a device would wait for the answer at every step."""
    state, looked = tiny_state("joint", bridge=bridge), []
    monkeypatch.setattr(model, "check_range", lambda *arguments: looked.append(arguments))
    for batch in state.batches(*scenes(16)):
        for update in STAGES["joint"].updates:
            update(state, batch)
    assert not looked
    state.descend()


@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_a_frozen_tokenizer_encodes_as_the_one_that_trained(precision, home):
    """Training's indices, those of the stage `generator` on it, and those of whoever loads it, are
    the same.
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
        seen = averaged(images).quantized.indices  # as a training step looks at images
    child = State(
        replace(recipe("tiny"), tokenizer_run="parent", tokenizer=trained.tokenizer),
        torch.device("cpu"),
    )
    assert torch.equal(child.observe(images, labels).indices, seen)
    assert torch.equal(load_tokenizer("parent").encode(images).flatten(1), seen)
    export(open_checkpoint("parent"), home / "parent.safetensors")
    assert torch.equal(load_tokenizer(home / "parent.safetensors").encode(images).flatten(1), seen)
    assert load_tokenizer("parent").latents(images).dtype == torch.float32
