"""The loss terms of Eqs. 2 to 5, as pure functions."""

import torch.nn.functional as F


def reconstruction_loss(reconstruction, images):
    """Compute L_rec of Eq. 2: the mean absolute difference, images in [-1, 1]."""
    return F.l1_loss(reconstruction, images)


def vq_losses(quantized):
    """Compute VQ's squared distances, as means over elements.

    The codebook term moves the code towards the latent, the commitment term the latent towards the
    code.
    """
    return {
        "codebook_loss": F.mse_loss(quantized.code, quantized.z.detach()),
        "commit_loss": F.mse_loss(quantized.z, quantized.code.detach()),
    }


def lfq_losses(quantized):
    """Compute LFQ's commitment term; there is no codebook term, because LFQ's codes are fixed."""
    return {"commit_loss": F.mse_loss(quantized.z, quantized.code)}


def ibq_losses(quantized):
    """Compute IBQ's three distances, summed as `codebook_loss`:

    (q - z)^2 + (sg(c) - z)^2 + 0.25 (c - sg(z))^2, where q is the decoder's input, c the code and
    z the latent.
    """
    z, code = quantized.z, quantized.code
    terms = (
        F.mse_loss(quantized.rows, z),
        F.mse_loss(z, code.detach()),
        F.mse_loss(code, z.detach()),
    )
    return {"codebook_loss": terms[0] + terms[1] + 0.25 * terms[2]}


QUANTIZER_LOSSES = {"vq": vq_losses, "lfq": lfq_losses, "ibq": ibq_losses}


def entropy_loss(rows, mean, global_mean=None):
    """Compute L_ent of Eq. 2 from what `Affinity.entropies` returns: `rows` (N,) and `mean` (K,).

    Its minimum, -ln K, is reached when every row is certain of its code and all codes are used
    equally. For a micro-batch, `global_mean` maps its mean row (K,) to the full batch's. The value
    and the gradient, averaged over the micro-batches, are then those of the full batch.
    """
    if global_mean is not None:
        mean = mean + (global_mean(mean.detach()) - mean).detach()
    return rows.mean() + (mean * (mean + 1e-5).log()).sum()


def generator_hinge_loss(fake_logits):
    """Compute L_GAN of Eq. 2, the tokenizer's adversarial loss: -mean D(x^)."""
    return -fake_logits.float().mean()


def discriminator_hinge_loss(real_logits, fake_logits):
    """Compute the discriminator's loss: half the sum of mean relu(1 - D(x)) and
    mean relu(1 + D(x^)).
    """
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def next_token_loss(logits, indices):
    """Compute L_NTP (Eq. 4), in nats per token, from logits (B, L, K) and indices (B, L)."""
    return F.cross_entropy(logits.flatten(0, 1), indices.flatten())


def expected_next_token_loss(logits, assignment):
    """Compute L_NTP against a distribution over codes: -sum_k a_ik log p_ik, a mean over tokens.

    It equals `next_token_loss` where the assignment's rows are one-hot. With a straight-through
    assignment (B, L, K) its gradient also reaches the targets.
    """
    return -(assignment * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def alignment_loss(projected, target, widths=None):
    """Compute L_align (Eq. 5): minus the mean cosine of projections and teacher features, both
    (B, L, C), in [-1, 1].

    With several teachers, their features are concatenated along C, `widths` lists the channels of
    each, and the loss is the mean over teachers.
    """
    if widths is None or len(widths) == 1:
        return -F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
    pairs = zip(projected.split(widths, -1), target.split(widths, -1))
    return sum(alignment_loss(*pair) for pair in pairs) / len(widths)
