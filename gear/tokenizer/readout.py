"""The two read-outs of the codebook assignment A onto an embedding table E (GEAR Eqs. 7 and 8, Fig. 2c)."""

import torch
import torch.nn.functional as F


def hard_indices(affinity):
    """Choose each position's code, q_i = argmax_k A_ik (Eq. 1): (..., K) -> (...) int64; the first of equals."""
    return affinity.argmax(-1)


def soft_assignment(affinity, tau):
    """Soften the assignment, pi_i = softmax(A_i / tau) (Eq. 8): (..., K) -> (..., K), rows sum to 1."""
    return (affinity.float() / tau).softmax(-1)


def straight_through_assignment(affinity, tau):
    """One-hot in value, softmax(A / tau) in gradient: onehot + pi - sg(pi). (..., K) -> (..., K)."""
    pi = soft_assignment(affinity, tau)
    onehot = F.one_hot(hard_indices(affinity), affinity.shape[-1]).to(pi.dtype)
    return onehot + (pi - pi.detach())


def hard_readout(affinity, embedding):
    """u^h_i = E_{q_i} (Eq. 7): affinity (B, L, K), embedding (K, D) -> (B, L, D); no gradient to the affinity."""
    return embedding[hard_indices(affinity)]


def soft_readout(affinity, embedding, tau):
    """u^s_i = pi_i E (Eq. 8): affinity (B, L, K), embedding (K, D) -> (B, L, D); differentiable in both.

    u^s -> u^h as tau -> 0. `tau` > 0 is the guidance temperature, in units of A.
    """
    return torch.matmul(soft_assignment(affinity, tau), embedding)


def straight_through_readout(affinity, embedding, tau):
    """Equal to `hard_readout` in value, with the gradient of `soft_readout`."""
    return torch.matmul(straight_through_assignment(affinity, tau), embedding)
