"""The loss terms, as pure functions; the distances between latents and codes stand in gear/tokenizer/quantize.py."""

import torch.nn.functional as F


def reconstruction_loss(reconstruction, images):
    """L_rec of Eq. 2: mean absolute difference, images in [-1, 1]."""
    return F.l1_loss(reconstruction, images)


def entropy_loss(rows, mean, whole=None):
    """L_ent of Eq. 2 from `readout.entropies`: minimal, -ln K, when every row is sure of its code and all codes are used alike.

    Of one part of a batch, `whole` turns the mean row into that of all of it: averaged over the parts, value and gradient are
    the batch's.
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
    """L_NTP against a distribution over codes, -sum_k a_ik log p_ik: equal to `next_token_loss` on one-hot rows.

    Through a straight-through assignment (B, L, K) its gradient also reaches what the targets are.
    """
    return -(assignment * F.log_softmax(logits.float(), -1)).sum(-1).mean()


def alignment_loss(projected, target, widths=None):
    """L_align (Eq. 5): minus the mean cosine between (B, L, C) projections and the teacher's features, in [-1, 1].

    Of several teachers, features stand side by side in C, `widths` of them each: the mean over teachers.
    """
    if widths is None or len(widths) == 1:
        return -F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
    pairs = zip(projected.split(widths, -1), target.split(widths, -1))
    return sum(alignment_loss(*pair) for pair in pairs) / len(widths)
