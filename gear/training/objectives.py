"""The updates of Algorithm 1. Each computes the loss of one network on the shared batch, and adds
the gradient of that loss to that network alone.

Each update has a companion function that lists its passes: the parts of the networks that it runs,
as [(part, mode, times)], from which gear/cost computes what a step costs. `mode` is "train" (the
gradient reaches weights and input), "fixed" (the gradient reaches the input only) or "forward" (no
gradient).
"""

import contextlib
import functools

import torch

from gear.evaluation.detector import degrade
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.readout import multiply
from gear.training.losses import (
    QUANTIZER_LOSSES,
    alignment_loss,
    discriminator_hinge_loss,
    entropy_loss,
    expected_next_token_loss,
    generator_hinge_loss,
    next_token_loss,
    reconstruction_loss,
)


@contextlib.contextmanager
def frozen(*modules):
    """Freeze networks inside the block: their weights get no gradient and nothing is dropped out.

    The networks are in evaluation mode. A discriminator is the exception: it stays in training
    mode, because its BatchNorm (if it has one) normalises by the batch's own statistics in every
    update.
    """
    modes = [(module.training, next(module.parameters()).requires_grad) for module in modules]
    for module in modules:
        module.train(isinstance(module, Discriminator)).requires_grad_(False)
    try:
        yield
    finally:
        for module, (is_training, requires_grad) in zip(modules, modes):
            module.train(is_training).requires_grad_(requires_grad)


def tokenizer_update(state, batch):
    """theta_tok <- theta_tok - eta grad (L_VQ + lambda L_align^s)   (Alg. 1, line 6; Eq. 11)."""
    objective = state.config.objective
    tokenized = batch.tokenized  # Alg. 1, lines 1 and 2: Z, A and the reconstruction x^
    losses = {"recon_loss": reconstruction_loss(tokenized.reconstruction, batch.images)}
    losses |= QUANTIZER_LOSSES[state.config.tokenizer.quantizer](tokenized.quantized)
    losses["entropy_loss"] = entropy_loss(*tokenized.quantized.entropies, batch.global_mean)
    if state.lpips is not None:
        losses["lpips_loss"] = state.lpips(tokenized.reconstruction, batch.images).mean()
    weights = {
        "lpips_loss": objective.lpips_weight,
        "gan_loss": objective.gan_weight,
        "entropy_loss": objective.entropy_weight,
        "commit_loss": objective.commit_weight,
        "soft_align_loss": objective.align_weight,
    }
    # the other networks stay frozen during the backward pass too
    with frozen(*(module for name, module in state.networks.items() if name != "tokenizer")):
        if state.gan_is_on:
            losses["gan_loss"] = generator_hinge_loss(state.discriminator(tokenized.reconstruction))
        if state.generator is not None:
            losses |= BRIDGES[objective.bridge](state, batch)
        return state.backward("tokenizer", losses, weights)


def tokenizer_passes(config):
    """List the passes of `tokenizer_update`, with the tokenizer's forward pass of the step."""
    objective = config.objective
    passes = [(part, "train", 1) for part in ("encoder", "quantizer", "decoder")]
    passes += [("LPIPS", "fixed", 1)] if objective.lpips_weight > 0 else []
    passes += [("discriminator", "fixed", 1)] if objective.gan_weight > 0 else []
    return passes + (
        [(part, "fixed", 1) for part in guidance_parts(config)]
        if config.trains("generator")
        else []
    )


def guidance_parts(config):
    """Return the names of the parts that the bridge of a joint stage runs."""
    bridge = config.objective.bridge
    if bridge in ("naive", "naive_inputs"):
        return ("read-out", "guidance")
    return ("read-out", "guidance", "projector") if bridge != "none" and config.is_aligned else ()


def soft_bridge(state, batch):
    """Compute L_align^s from softmax(A / tau) E   (Alg. 1, lines 3 to 5): the method GEAR."""
    return _guidance(state, batch, batch.tokenized.quantized.affinity.soft_readout)


def straight_through_bridge(state, batch):
    """Compute L_align^s from the one-hot assignment, with the gradient of the soft assignment.

    The public code offers this as a flag.
    """
    return _guidance(state, batch, batch.tokenized.quantized.affinity.straight_through_readout)


def _guidance(state, batch, readout):
    """Run a read-out of A (Eqs. 7 and 8) through the frozen generator up to the tap layer, and
    return its alignment loss.
    """
    objective, tap = state.config.objective, state.config.generator.tap_layer
    if objective.align_weight == 0:
        return {}
    with frozen(state.generator, state.projector):
        u = readout(state.generator.embedding, objective.tau)
        hidden = state.generator.hidden(u, batch.labels, [tap], check=False)[tap]
        return {
            "soft_align_loss": _loss(
                state, aligned, state.projector, hidden, batch.target, state.widths
            )
        }


def naive_bridge(state, batch):
    """Compute L_NTP so that its gradient reaches the tokenizer through the generator's inputs and
    through its targets   (Fig. 2b).

    The assignment is one-hot in the forward pass and softmax(A / tau) in the backward pass. The
    tokenizer can now lower L_NTP by making its indices easier to predict, and its codebook
    collapses.
    """
    assignment, logits = _predict(state, batch)
    return {"naive_ntp_loss": expected_next_token_loss(logits, assignment)}


def naive_inputs_bridge(state, batch):
    """Compute L_NTP so that its gradient reaches the tokenizer through the generator's inputs
    alone; the targets are fixed indices.
    """
    _, logits = _predict(state, batch)
    return {"naive_ntp_loss": next_token_loss(logits, batch.indices)}


def _predict(state, batch):
    """Predict tokens from straight-through embeddings with the frozen generator; returns
    (assignment, logits), both (B, L, K).
    """
    with frozen(state.generator):
        assignment = batch.tokenized.quantized.affinity.straight_through_assignment(
            state.config.objective.tau
        )
        return assignment, state.generator(
            multiply(assignment, state.generator.embedding), batch.labels, check=False
        )


def no_bridge(state, batch):
    """Return no guidance loss: the tokenizer trains on its own losses, while the generator trains
    on its indices.
    """
    return {}


BRIDGES = {
    "soft": soft_bridge,
    "straight_through": straight_through_bridge,
    "naive_inputs": naive_inputs_bridge,
    "naive": naive_bridge,
    "none": no_bridge,
}


def discriminator_update(state, batch):
    """Update the discriminator by its hinge loss on real images and this step's reconstructions."""
    if not state.gan_is_on:
        return {}
    real, fake = batch.images, batch.tokenized.reconstruction.detach()
    loss = discriminator_hinge_loss(state.discriminator(real), state.discriminator(fake))
    return state.backward("discriminator", {"disc_loss": loss}, {})


def discriminator_passes(config):
    """List the passes of `discriminator_update`: one on images, one on their reconstructions."""
    return [("discriminator", "train", 2)] if config.objective.gan_weight > 0 else []


def generator_update(state, batch):
    """theta_AR <- theta_AR - eta grad (L_NTP + lambda L_align^h)   (Alg. 1, line 7; Eq. 12).

    The generator sees hard indices only: the arg-max cuts every gradient path to the tokenizer.
    """
    config, generator = state.config, state.generator
    top, tap = config.generator.layers, config.generator.tap_layer
    # line 4: the hard sequence S^h through all layers
    hidden = generator.hidden(batch.indices, batch.labels, [tap, top], dropped=batch.dropped)
    # line 5: L_NTP
    losses = {"ntp_loss": _loss(state, predicted, generator, hidden[top], batch.indices)}
    if config.objective.align_weight > 0:  # line 5: L_align^h
        losses["align_loss"] = _loss(
            state, aligned, state.projector, hidden[tap], batch.target, state.widths
        )
    return state.backward("generator", losses, {"align_loss": config.objective.align_weight})


def generator_passes(config):
    """List the passes of `generator_update`."""
    return [("generator", "train", 1)] + ([("projector", "train", 1)] if config.is_aligned else [])


def predicted(generator, hidden, indices):
    """Compute L_NTP from the last hidden states (B, L, D) and the indices (B, L) to predict."""
    return next_token_loss(generator.logits(hidden), indices)


def aligned(projector, hidden, target, widths):
    """Compute L_align from the tap layer's hidden states (B, L, D) and the teacher's features
    (B, L, C).
    """
    return alignment_loss(projector(hidden), target, widths)


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


def _loss(state, function, *arguments):
    """Call a loss function; compile it first if the networks of this state are compiled."""
    return (compiled(function) if state.is_compiled else function)(*arguments)


def teacher_update(state, batch):
    """Update the scenes teacher by the cross entropy of each patch's factors, its supervision."""
    return state.backward("teacher", state.teacher.factor_losses(batch.images, batch.labels), {})


def teacher_passes(config):
    """List the passes of `teacher_update`."""
    return [("teacher", "train", 1)]


def detector_update(state, batch):
    """Update the detector by the objects of each scene, its supervision."""
    losses = state.detector.object_losses(degrade(batch.images), batch.labels)
    return state.backward("detector", losses, {})


def detector_passes(config):
    """List the passes of `detector_update`."""
    return [("detector", "train", 1)]


PASSES = {
    tokenizer_update: tokenizer_passes,
    discriminator_update: discriminator_passes,
    generator_update: generator_passes,
    teacher_update: teacher_passes,
    detector_update: detector_passes,
}
