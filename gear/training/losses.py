"""The loss terms of Eqs. 2 to 5, as pure functions."""

import torch.nn.functional as F


def reconstruction_loss(reconstruction, images):
    """L_rec of Eq. 2: mean absolute difference, images in [-1, 1]."""
    return F.l1_loss(reconstruction, images)


def vq_losses(quantized):
    """The distances of VQ, means over elements: the codebook term moves the code to the latent, the
    commitment term back.
    """
    return {
        "codebook_loss": F.mse_loss(quantized.code, quantized.z.detach()),
        "commit_loss": F.mse_loss(quantized.z, quantized.code.detach()),
    }


def lfq_losses(quantized):
    """LFQ has no codebook to move: its commitment term alone."""
    return {"commit_loss": F.mse_loss(quantized.z, quantized.code)}


def ibq_losses(quantized):
    """IBQ's distances as `codebook_loss`: (q - z)^2 of the decoder's q, (sg(c) - z)^2, .25 (c -
    sg(z))^2.
    """
    z, code = quantized.z, quantized.code
    terms = (
        F.mse_loss(quantized.rows, z),
        F.mse_loss(z, code.detach()),
        F.mse_loss(code, z.detach()),
    )
    return {"codebook_loss": terms[0] + terms[1] + 0.25 * terms[2]}


QUANTIZER_LOSSES = {"vq": vq_losses, "lfq": lfq_losses, "ibq": ibq_losses}


def entropy_loss(rows, mean, whole=None):
    """L_ent of Eq. 2 from `Affinity.entropies`: -ln K, its least, when every row is sure of its
    code and all are used alike.

    Of one part of a batch, `whole` turns the mean row into that of all of it: averaged over the
    parts, value and gradient are the batch's.
    """
    if whole is not None:
        mean = mean + (whole(mean.detach()) - mean).detach()
    return rows.mean() + (mean * (mean + 1e-5).log()).sum()


def generator_hinge_loss(fake_logits):
    """L_GAN of Eq. 2, the tokenizer's side: -mean D(x^)."""
    return -fake_logits.float().mean()


def discriminator_hinge_loss(real_logits, fake_logits):
    """The discriminator's side: mean of relu(1 - D(x)) and relu(1 + D(x^)), halved."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def next_token_loss(logits, indices):
    """L_NTP (Eq. 4), a mean over tokens: logits (B, L, K), indices (B, L) -> nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), indices.flatten())


def expected_next_token_loss(logits, assignment):
    """L_NTP against a distribution over codes, -sum_k a_ik log p_ik: equal to `next_token_loss` on
    one-hot rows.

    Through a straight-through assignment (B, L, K) its gradient also reaches what the targets are.
    """
    return -(assignment * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def alignment_loss(projected, target, widths=None):
    """L_align (Eq. 5): minus the mean cosine between (B, L, C) projections and the teacher's
    features, in [-1, 1].

    Of several teachers, features stand side by side in C, `widths` of them each: the mean over
    teachers.
    """
    if widths is None or len(widths) == 1:
        return -F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
    pairs = zip(projected.split(widths, -1), target.split(widths, -1))
    return sum(alignment_loss(*pair) for pair in pairs) / len(widths)
