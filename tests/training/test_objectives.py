"""Algorithm 1: the gradient of each update, the networks that it changes, and how often each part
runs; also the losses, the learning-rate schedule and the averages.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same, scenes, tiny_state, weights

from gear.config import UserError
from gear.evaluation.lpips import load_lpips
from gear.measures.reconstruction import l1, psnr
from gear.training import losses
from gear.training.objectives import (
    BRIDGES,
    discriminator_update,
    generator_update,
    naive_bridge,
    soft_bridge,
    tokenizer_update,
)
from gear.training.optim import EMA, Optimizer, learning_rate_factor
from gear.training.settings import OptimizerConfig
from gear.training.stages import STAGES

IMAGES, LABELS = scenes(4)
GOLDEN = Path(__file__).parents[1] / "golden"


def recorded(state, update, *modules):
    """Run one update without an optimizer step; returns its weighted loss, and its gradients to all
    parameters of `modules`.
    """
    losses, backward = [], torch.Tensor.backward
    with mock.patch.object(
        torch.Tensor, "backward", lambda loss: (losses.append(loss.detach()), backward(loss))
    ):
        update(state, state.observe(IMAGES, LABELS))
    (loss,), parameters = losses, [p for module in modules for p in module.parameters()]
    return SimpleNamespace(loss=loss, parameters=parameters, gradients=[p.grad for p in parameters])


def update_and_step(state, update, batch):
    """Run one update and an optimizer step; returns the update's losses."""
    losses = update(state, batch)
    if losses:
        state.descend()
    return losses


def assert_same_gradients(gradients, expected):
    assert len(gradients) == len(expected)
    for a, b in zip(gradients, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7


def by_hand(state):
    """Compute the terms of L_VQ and L_align^s (Eqs. 2 and 11) directly from the networks' parts:
    {term: scalar}, unweighted.
    """
    tokenizer, generator, config = state.tokenizer, state.generator.eval(), state.config
    latents = tokenizer.latents(IMAGES)  # (B, D, h, w)
    z, c = (
        F.normalize(latents.flatten(2).mT, dim=-1),
        F.normalize(tokenizer.quantizer.codebook, dim=-1),
    )
    affinity = -(z[:, :, None] - c).square().sum(-1)  # (B, L, K)
    code = c[affinity.argmax(-1)]
    straight = z + (code - z).detach()
    reconstruction = tokenizer.decode_latents(straight.mT.reshape(latents.shape))
    logp = (affinity / 0.01).log_softmax(-1).flatten(0, 1)
    p, mean = logp.exp(), logp.exp().mean(0)
    terms = {
        "recon_loss": (reconstruction - IMAGES).abs().mean(),
        "codebook_loss": (code - z.detach()).square().mean(),
        "commit_loss": (code.detach() - z).square().mean(),
        "entropy_loss": -(p * logp).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum(),
        "gan_loss": -state.discriminator(reconstruction).mean(),
    }
    u_soft = (affinity / config.objective.tau).softmax(-1) @ generator.token_embedding.weight
    x = torch.cat([generator.class_embedding(LABELS)[:, None], u_soft[:, :-1]], 1)
    for block in generator.blocks[: config.generator.tap_layer]:
        x = block(x, generator.rotation(x.shape[1], x.device)[: x.shape[1]])
    a, b = state.projector(x), state.teacher_features(IMAGES)
    terms["soft_align_loss"] = -((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    return terms


# -- the bridges -----------------------------------------------------------------------------------

LAMBDAS = dict(align_weight=0.15, tau=0.05, gan_weight=0.08, entropy_weight=0.02, commit_weight=0.7)


@pytest.mark.parametrize("bridge", ("soft", "none"))
def test_tokenizer_gradient_is_that_of_l_vq_plus_lambda_l_align(bridge):
    """The gradient equals autograd's of the formulas, without a bridge that of L_VQ alone, and every
    term contributes to it.
    """
    state = tiny_state(bridge=bridge, generator=dict(tap_layer=2), **LAMBDAS)
    update = recorded(state, tokenizer_update, state.tokenizer)
    share = {
        "recon_loss": 1.0,
        "codebook_loss": 1.0,
        "commit_loss": 0.7,
        "entropy_loss": 0.02,
        "gan_loss": 0.08,
    }
    share |= {"soft_align_loss": 0.15} if bridge == "soft" else {}
    terms, parameters = by_hand(state), list(state.tokenizer.parameters())
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    term_gradients = [
        torch.autograd.grad(weight * terms[term], parameters, **options)
        for term, weight in share.items()
    ]
    expected = [sum(gradients) for gradients in zip(*term_gradients)]
    assert_same_gradients(update.gradients, expected)
    total = sum(weight * terms[term].item() for term, weight in share.items())
    assert update.loss.item() == pytest.approx(total, rel=1e-4)
    norm = lambda gradients: torch.stack([g.norm() for g in gradients]).norm()  # noqa: E731
    assert all(norm(gradients) > 0.01 * norm(expected) for gradients in term_gradients)


def test_the_soft_bridge_draws_no_dropout_and_drops_no_label():
    """Two soft passes agree although training uses dropout; afterwards the generator is in training
    mode again.
    """
    state = tiny_state()
    state.generator.train()
    batch = state.observe(IMAGES, LABELS)
    first, second = (soft_bridge(state, batch)["soft_align_loss"] for _ in range(2))
    assert torch.equal(first, second)
    assert state.generator.training and all(p.requires_grad for p in state.generator.parameters())
    assert generator_update(state, batch)["ntp_loss"] != generator_update(state, batch)["ntp_loss"]


def test_next_token_prediction_gives_the_tokenizer_exactly_nothing():
    """There is no gradient at all, and neither is there one of the discriminator's loss."""
    state = tiny_state(bridge="soft")
    parts = [state.tokenizer, state.generator, state.projector]
    gradients = recorded(state, generator_update, *parts).gradients
    count = len(list(state.tokenizer.parameters()))
    assert all(g is None for g in gradients[:count]) and all(
        g is not None for g in gradients[count:]
    )
    state = tiny_state(bridge="soft")
    assert all(
        g is None
        for g in recorded(state, discriminator_update, state.tokenizer, state.generator).gradients
    )


def test_generator_gradient_is_that_of_l_ntp_plus_lambda_l_align():
    state = tiny_state(align_weight=0.7)
    for module in state.generator.modules():  # no dropout, so that the loss can be repeated by hand
        module.p = 0.0
    object.__setattr__(state.config.generator, "class_dropout", 0.0)
    update = recorded(state, generator_update, state.generator, state.projector)
    generator, tap = state.generator, state.config.generator.tap_layer
    indices = state.tokenizer.encode(IMAGES).flatten(1)
    logp = generator(indices, LABELS).log_softmax(-1)
    ntp = -logp.gather(-1, indices[..., None]).mean()
    a, b = (
        state.projector(generator.hidden(indices, LABELS, [tap])[tap]),
        state.teacher_features(IMAGES),
    )
    expected = ntp - 0.7 * ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert_same_gradients(
        update.gradients, torch.autograd.grad(expected, update.parameters, allow_unused=True)
    )


def test_naive_bridge_reaches_the_tokenizer_through_inputs_and_through_targets():
    """The gradient of the naive term is the sum of both paths, and both contribute.

    The gradient of the tokenizer's update is that of L_VQ plus that of the naive term.
    """
    state = tiny_state(bridge="naive", tau=0.1)
    batch, generator = state.observe(IMAGES, LABELS), state.generator.eval()
    parameters = list(state.tokenizer.parameters())
    encoder = [state.tokenizer.quant_conv.weight, state.tokenizer.quantizer.codebook]

    def gradient(loss, inputs=encoder):
        return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)

    assignment = batch.tokenized.quantized.affinity.straight_through_assignment(0.1)
    fixed = assignment.detach()
    logits = [
        generator(a @ generator.embedding, LABELS).log_softmax(-1) for a in (assignment, fixed)
    ]
    by_inputs = gradient(-(fixed * logits[0]).sum(-1).mean())
    by_targets = gradient(-(assignment * logits[1]).sum(-1).mean())
    naive = naive_bridge(state, batch)["naive_ntp_loss"]
    for i, t, both in zip(by_inputs, by_targets, gradient(naive)):
        assert min(i.norm(), t.norm()) > 0.05 * both.norm() > 0
        assert (i + t - both).norm() < 1e-3 * both.norm()
    indices = batch.indices
    assert naive.item() == pytest.approx(
        losses.next_token_loss(generator(indices, LABELS), indices).item(), rel=1e-5
    )
    assert any(g is not None for g in gradient(naive, parameters))
    update = recorded(state, tokenizer_update, state.tokenizer).gradients
    plain = tiny_state(bridge="none")
    without = recorded(plain, tokenizer_update, plain.tokenizer).gradients
    added = torch.autograd.grad(naive, parameters, allow_unused=True)
    assert_same_gradients(update, [w if a is None else w + a for w, a in zip(without, added)])


def test_naive_inputs_bridge_carries_the_path_through_the_inputs_alone():
    state = tiny_state(bridge="naive_inputs", tau=0.1)
    batch, generator = state.observe(IMAGES, LABELS), state.generator.eval()
    encoder = [state.tokenizer.quant_conv.weight, state.tokenizer.quantizer.codebook]
    assignment = batch.tokenized.quantized.affinity.straight_through_assignment(0.1)
    logits = generator(assignment @ generator.embedding, LABELS).log_softmax(-1)
    expected = torch.autograd.grad(
        -(assignment.detach() * logits).sum(-1).mean(), encoder, retain_graph=True
    )
    loss = BRIDGES["naive_inputs"](state, batch)["naive_ntp_loss"]
    for expected_gradient, gradient in zip(
        expected, torch.autograd.grad(loss, encoder, retain_graph=True)
    ):
        assert (expected_gradient - gradient).norm() < 1e-4 * expected_gradient.norm()


def test_straight_through_bridge_has_the_hard_value_and_another_gradient_than_the_soft_one():
    state = tiny_state(bridge="straight_through", tau=0.1)
    batch, tap = state.observe(IMAGES, LABELS), state.config.generator.tap_layer
    hidden = state.generator.eval().hidden(batch.indices, LABELS, [tap])[tap]
    hard = losses.alignment_loss(state.projector(hidden), batch.target)
    terms = {
        name: BRIDGES[name](state, batch)["soft_align_loss"]
        for name in ("soft", "straight_through")
    }
    assert terms["straight_through"].item() == pytest.approx(hard.item(), abs=1e-5)
    assert abs(terms["soft"].item() - hard.item()) > 1e-5
    weight = state.tokenizer.quant_conv.weight
    gradient = {
        name: torch.autograd.grad(term, weight, retain_graph=True)[0]
        for name, term in terms.items()
    }
    assert gradient["straight_through"].norm() > 0
    assert (gradient["straight_through"] - gradient["soft"]).norm() > 1e-3 * gradient["soft"].norm()


def test_without_a_bridge_the_tokenizer_trains_as_in_its_own_stage():
    joint, alone = tiny_state(bridge="none"), tiny_state("tokenizer")
    for _ in range(3):
        for state in (joint, alone):
            batch = state.observe(IMAGES, LABELS)
            for update in STAGES[state.config.stage].updates:
                update(state, batch)
            state.descend()
            state.finish_step()
    for name in ("tokenizer", "discriminator"):
        assert same(weights(joint.networks[name]), weights(alone.networks[name]))
    assert same(
        weights(joint.averages["tokenizer"].module), weights(alone.averages["tokenizer"].module)
    )


# -- the updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", ("soft", "naive"))
@pytest.mark.parametrize("update, moves", (
    (tokenizer_update, {"tokenizer"}),
    (discriminator_update, {"discriminator"}),
    (generator_update, {"generator", "projector"}),
))  # fmt: skip
def test_an_update_moves_its_own_networks_and_leaves_no_gradient(update, moves, bridge):
    """No weight changes before the step, and only the update's own networks have a gradient."""
    state = tiny_state(bridge=bridge)
    before = {name: weights(module) for name, module in state.networks.items()}
    update(state, state.observe(IMAGES, LABELS))
    assert all(same(before[name], weights(module)) for name, module in state.networks.items())
    assert {
        n
        for n, module in state.networks.items()
        if any(p.grad is not None for p in module.parameters())
    } == moves
    state.descend()
    moved = {
        name for name, module in state.networks.items() if not same(before[name], weights(module))
    }
    assert moved == moves
    assert all(p.grad is None for module in state.networks.values() for p in module.parameters())


def count_calls(modules):
    calls = {}
    for name, module in modules.items():
        calls[name] = 0
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    return calls


@pytest.mark.parametrize("tap", (1, 2))
def test_the_soft_pass_runs_to_the_tap_and_the_hard_pass_to_the_top(tap):
    state = tiny_state(generator=dict(tap_layer=tap))
    calls = count_calls(dict(enumerate(state.generator.blocks, start=1)))
    batch = state.observe(IMAGES, LABELS)
    assert calls == {1: 0, 2: 0, 3: 0}
    tokenizer_update(state, batch)
    assert calls == {i: int(i <= tap) for i in (1, 2, 3)}
    generator_update(state, batch)
    assert calls == {i: int(i <= tap) + 1 for i in (1, 2, 3)}


def test_a_joint_step_is_one_tokenizer_forward_and_one_teacher_forward():
    state = tiny_state()
    tokenizer = state.tokenizer
    parts = {"tokenizer": tokenizer, "encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
    calls = count_calls(
        parts | {"teacher": state.teacher_features, "discriminator": state.discriminator}
    )
    batch = state.observe(IMAGES, LABELS)
    for update in STAGES["joint"].updates:
        update(state, batch)
    assert calls == {"tokenizer": 1, "encoder": 1, "decoder": 1, "teacher": 1, "discriminator": 3}


def test_no_alignment_needs_no_teacher():
    state = tiny_state(align_weight=0.0)
    assert "projector" not in state.networks and state.teacher_features is None
    batch = state.observe(IMAGES, LABELS)
    assert "soft_align_loss" not in tokenizer_update(state, batch)
    assert set(generator_update(state, batch)) == {"ntp_loss"}


def test_the_adversarial_term_starts_at_its_share_of_the_steps():
    state = tiny_state(steps=10, gan_start=0.5)
    for step, is_on in ((0, False), (4, False), (5, True), (9, True)):
        state.step = step
        batch, before = state.observe(IMAGES, LABELS), weights(state.discriminator)
        assert ("gan_loss" in tokenizer_update(state, batch)) == is_on
        assert bool(discriminator_update(state, batch)) == is_on
        state.descend()
        assert same(before, weights(state.discriminator)) != is_on
    assert not tiny_state(gan_weight=0.0).gan_is_on


def test_target_gradient_and_images_stay_out_of_the_teacher():
    batch = tiny_state().observe(IMAGES, LABELS)
    assert not batch.target.requires_grad and batch.target.shape == (4, 64, 64)
    assert not batch.indices.requires_grad and batch.tokenized.reconstruction.requires_grad


def test_a_new_run_starts_its_average_from_data_too():
    state = tiny_state()
    state.start(state.config.data)
    assert (state.tokenizer.quant_conv.weight == 0).all()
    assert same(weights(state.tokenizer), weights(state.averages["tokenizer"].module))


def test_the_generator_stage_needs_a_tokenizer():
    with pytest.raises(UserError, match="set tokenizer_run"):
        tiny_state("generator")


# -- descend ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("update, term", (
    (tokenizer_update, "'recon_loss' of the tokenizer is nan at step 7"),
    (discriminator_update, "'disc_loss' of the discriminator is nan at step 7"),
    (generator_update, "'align_loss' of the generator is nan at step 7"),
))  # fmt: skip
def test_a_nan_names_its_term_and_changes_nothing(update, term):
    state = tiny_state()
    state.step, images = 7, IMAGES.clone()
    images[1, 0, 5, 5] = torch.nan
    batch = state.observe(images, LABELS)
    batch.indices = state.tokenizer.encode(IMAGES).flatten(
        1
    )  # so that the next-token loss is finite
    before = weights(*state.networks.values())
    update(state, batch)
    with pytest.raises(FloatingPointError, match=term):
        state.descend()
    assert all(p.grad is None for module in state.networks.values() for p in module.parameters())
    assert same(before, weights(*state.networks.values()))


def test_an_infinite_second_term_is_named():
    state = tiny_state()
    value = state.generator.head.weight.sum()
    state.backward("generator", {"ntp_loss": value, "align_loss": value + torch.inf}, {})
    with pytest.raises(FloatingPointError, match="'align_loss' of the generator is inf"):
        state.descend()


def test_a_finite_loss_with_a_gradient_that_is_not_leaves_the_weights_alone():
    state = tiny_state()
    before = weights(*state.networks.values())
    root_of_zero = (0 * state.generator.head.weight).square().sum().sqrt()
    state.backward("generator", {"ntp_loss": root_of_zero}, {})
    with pytest.raises(
        FloatingPointError, match="the norm of the gradient of the generator is nan"
    ):
        state.descend()
    assert same(before, weights(*state.networks.values()))


def test_descend_weighs_terms_and_reports_them_unweighted():
    state = tiny_state(steps=10)
    weight = state.generator.head.weight
    before = weight.square().sum().item()
    state.backward(
        "generator", {"a": weight.sum(), "b": weight.square().sum()}, {"b": 3.0, "absent": 9.0}
    )
    torch.testing.assert_close(weight.grad, 1 + 6 * weight)
    reported = state.descend()
    assert (
        reported["b"] == before and not reported["b"].requires_grad and set(reported) == {"a", "b"}
    )


# -- losses ----------------------------------------------------------------------------------------


def test_reconstruction_loss_is_the_mean_absolute_difference():
    assert (
        losses.reconstruction_loss(
            torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
        ).item()
        == 1
    )


def test_hinge_losses_at_known_logits():
    real, fake = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([-2.0, -1.0, 0.0, 1.0])
    assert losses.discriminator_hinge_loss(real, fake).item() == pytest.approx(
        0.5 * (3 / 4 + 3 / 4)
    )
    assert losses.discriminator_hinge_loss(real[:2], fake).item() == pytest.approx(
        0.5 * 3 / 4
    )  # real images beyond the margin cost nothing
    assert losses.discriminator_hinge_loss(real, fake[:2]).item() == pytest.approx(0.5 * 3 / 4)
    assert losses.discriminator_hinge_loss(torch.zeros(4), torch.zeros(4)).item() == 1
    assert losses.generator_hinge_loss(fake).item() == pytest.approx(
        0.5
    )  # minus the mean logit, without a hinge


def test_next_token_loss_is_the_mean_negative_log_likelihood():
    logits, indices = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = (
        -sum(logits[b, i].log_softmax(0)[indices[b, i]] for b in range(2) for i in range(3)) / 6
    )
    torch.testing.assert_close(losses.next_token_loss(logits, indices), expected)


def test_expected_next_token_loss_is_next_token_loss_on_one_hot_rows():
    logits, indices = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = losses.next_token_loss(logits, indices)
    torch.testing.assert_close(
        losses.expected_next_token_loss(logits, F.one_hot(indices, 5).float()), expected
    )
    uniform = losses.expected_next_token_loss(torch.zeros(2, 3, 5), torch.rand(2, 3, 5).softmax(-1))
    assert uniform.item() == pytest.approx(math.log(5))


def test_alignment_loss_is_minus_the_mean_cosine():
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for target, expected in ((a, -1), (5 * a, -1), (-a, 1)):
        assert losses.alignment_loss(a, target).item() == pytest.approx(expected, abs=1e-6)
    expected = -torch.stack(
        [(x @ y) / (x.norm() * y.norm()) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]
    ).mean()
    torch.testing.assert_close(losses.alignment_loss(a, b), expected)
    assert losses.alignment_loss(a.bfloat16(), a.bfloat16()).dtype == torch.float32


def test_lpips_without_its_weights_is_none_and_never_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_lpips("cpu") is None


# -- schedule, optimizer, average ------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, factor",
    ((0, 0.25), (1, 0.5), (3, 1), (4, 1), (50, 1), (75, 0.55), (99, 0.118), (100, 0.1)),
)
def test_learning_rate_corners(step, factor):
    config = OptimizerConfig(warmup_steps=4, decay_from=0.5, decay_to=0.1)
    assert learning_rate_factor(config, step, 100) == pytest.approx(factor)
    assert (
        learning_rate_factor(OptimizerConfig(), min(step, 99), 100) == 1
    )  # by default constant, from the first step


def test_the_schedule_reaches_the_optimizer():
    state = tiny_state()
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, warmup_steps=10))
    state.step = 3
    update_and_step(state, tokenizer_update, state.observe(IMAGES, LABELS))
    (group,) = state.optimizers["tokenizer"].adam.param_groups
    assert group["lr"] == pytest.approx(0.4 * state.config.optimizer.tokenizer_lr)


def network_and_optimizer(clip=1.0):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return network, Optimizer([network[0], network[2]], 0.01, OptimizerConfig(clip=clip))


def descend(network, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        (network(x) - x.sum(1, keepdim=True)).square().mean().backward()
        norm = optimizer.clip_gradients()
        optimizer.step(1 / (1 + step))
    return norm


def test_a_restored_optimizer_takes_the_same_next_step_bit_for_bit():
    network, optimizer = network_and_optimizer()
    descend(network, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    saved_weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    descend(network, optimizer, range(3, 5))
    restored_network, restored_optimizer = network_and_optimizer()
    restored_network.load_state_dict(saved_weights)
    restored_optimizer.load_tensors(saved)
    descend(restored_network, restored_optimizer, range(3, 5))
    assert same(weights(network), weights(restored_network))
    reset_network, reset_optimizer = network_and_optimizer()
    reset_network.load_state_dict(saved_weights)
    descend(reset_network, reset_optimizer, range(3, 5))
    assert not same(weights(network), weights(reset_network))


def test_the_gradient_is_clipped_over_all_modules_together():
    """The first moment after one step is a tenth of the clipped gradient; `clip_gradients` returns
    the norm before clipping.
    """
    network, optimizer = network_and_optimizer(clip=0.5)
    norm = descend(network, optimizer, [0])
    moments = [t for name, t in optimizer.tensors().items() if name.endswith("exp_avg")]
    assert norm > 1 and len(moments) == 4
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(
        0.1 * 0.5, rel=1e-4
    )
    assert all(p.grad is None for p in network.parameters())


def test_average_by_hand():
    module = torch.nn.BatchNorm1d(1)  # one weight, one bias, buffers
    average = EMA(module, 0.9)
    expected = module.weight.item()
    for value in (3.0, -1.0, 0.5):
        module.weight.data.fill_(value)
        module.running_mean.fill_(10 * value)
        average.update(module)
        expected = 0.9 * expected + 0.1 * value
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert (
        expected == pytest.approx(0.729 + 0.081 * 3 - 0.09 + 0.05)
        and average.module.running_mean.item() == 5
    )
    assert (
        module.weight.item() == 0.5
        and not average.module.training
        and not average.module.weight.requires_grad
    )


def test_finish_step_averages_tokenizer_and_generator_with_their_own_decay():
    state = tiny_state(stir=False)
    before = {name: weights(average.module) for name, average in state.averages.items()}
    batch = state.observe(IMAGES, LABELS)
    for update in STAGES["joint"].updates:
        update(state, batch)
    state.descend()
    state.finish_step()
    assert state.step == 1 and set(before) == {"tokenizer", "generator"}
    for name in before:
        decay = getattr(state.config.optimizer, f"{name}_ema")
        for old, new, now in zip(
            before[name], weights(state.averages[name].module), weights(state.networks[name])
        ):
            torch.testing.assert_close(new, decay * old + (1 - decay) * now)


# -- reconstruction quality ------------------------------------------------------------------------


def test_l1_and_psnr_golden():
    """Compares with scikit-image and the public formulas; the PSNR of a pooled MSE differs."""
    expected = json.loads((GOLDEN / "expected.json").read_text())["recon"]["expected"]
    arrays = np.load(GOLDEN / "recon.npz")
    reconstruction, images = (
        torch.from_numpy(arrays[name]) * 2 - 1 for name in ("rec", "ref")
    )  # [0, 1] -> [-1, 1]
    assert psnr(reconstruction, images).tolist() == pytest.approx(
        expected["skimage_psnr_per_image"], abs=1e-4
    )
    assert psnr(reconstruction, images).mean().item() == pytest.approx(
        expected["gear_psnr_mean_over_images"], abs=1e-4
    )
    assert (
        abs(psnr(reconstruction, images).mean().item() - expected["psnr_of_pooled_mse_WRONG"]) > 1
    )
    assert l1(reconstruction, images).mean().item() == pytest.approx(expected["gear_l1"], abs=2e-5)


def test_l1_and_psnr_limits():
    images = torch.zeros(2, 3, 4, 4)
    assert l1(images, images).tolist() == [0, 0] and psnr(images, images).tolist() == pytest.approx(
        [120, 120]
    )
    assert psnr(images + 0.2, images).tolist() == pytest.approx(
        [20, 20], abs=1e-4
    )  # 0.1 in [0, 1]: 1 / MSE = 100
    assert l1(images + 9, images + 1).tolist() == [0, 0]  # the reconstruction is clamped


# -- several teachers ------------------------------------------------------------------------------


def test_several_teachers_are_averaged_each_with_its_projector():
    """Features are concatenated, and the loss is the mean of the losses of each teacher alone."""
    state = tiny_state("joint")
    several = tiny_state("joint", teacher="scenes,scenes")
    dim = state.widths[0]
    assert several.widths == [dim, dim] and len(several.networks["projector"]) == 2
    batch = several.observe(IMAGES, LABELS)
    assert batch.target.shape[-1] == 2 * dim and torch.equal(
        batch.target[..., :dim], state.teacher_features(IMAGES)
    )
    hidden = torch.randn(len(IMAGES), 64, several.config.generator.width)
    both = losses.alignment_loss(several.projector(hidden), batch.target, several.widths)
    alone = [losses.alignment_loss(p(hidden), batch.target[..., :dim]) for p in several.projector]
    assert float(both) == pytest.approx(float(sum(alone)) / 2, abs=1e-6) and float(
        alone[0]
    ) != float(alone[1])
    for update in STAGES["joint"].updates:
        update_losses = update(several, batch)
    assert torch.isfinite(update_losses["align_loss"])
