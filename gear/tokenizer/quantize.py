"""Quantizers behind one interface: an affinity A to every code, the hard index, a quantised latent with its gradient rule."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gear.tokenizer.readout import hard_indices

ENTROPY_TEMPERATURE = 0.01  # of the entropy term; not the guidance temperature tau


@dataclass
class Quantized:
    """What quantising latents gives: `affinity` (B, L, K) float32, `indices` (B, L), `latents` (B, D, h, w), `losses`."""

    affinity: torch.Tensor
    indices: torch.Tensor
    latents: torch.Tensor
    losses: dict


class VectorQuantizer(nn.Module):
    """VQ with L2-normalised latents and codes (LlamaGen's VQ-16).

    A_ik = -||z_i - c_k||^2 = 2 z_i c_k - 2 on unit vectors (Eq. 6), in [-4, 0]. The decoder receives the unit code; its
    gradient passes straight through to the normalised latent and never to the codebook.
    """

    def __init__(self, config):
        super().__init__()
        k = config.codebook_size
        self.codebook = nn.Parameter(F.normalize(torch.empty(k, config.code_dim).uniform_(-1 / k, 1 / k), dim=-1))

    def affinity(self, latents):
        """Return A (Eq. 6) for latents (B, D, h, w): (B, L, K), float32 whatever the autocast dtype."""
        with torch.autocast(latents.device.type, enabled=False):
            return 2 * self._rows(latents) @ self.codes().T - 2

    def codes(self):
        """Return the codebook C that distances are taken to: (K, D), unit rows."""
        return F.normalize(self.codebook.float(), dim=-1)

    def lookup(self, indices):
        """Return the latent of each index: (B, h, w) -> (B, D, h, w)."""
        return self.codes()[indices].permute(0, 3, 1, 2)

    def forward(self, latents):
        """Quantise latents (B, D, h, w); the loss terms are means over elements (rows, for the entropy), unweighted."""
        b, d, h, w = latents.shape
        affinity = self.affinity(latents)  # (B, L, K)
        indices = hard_indices(affinity)
        z, code = self._rows(latents), self.codes()[indices]  # (B, L, D)
        losses = {
            "codebook_loss": F.mse_loss(code, z.detach()),
            "commit_loss": F.mse_loss(z, code.detach()),
            "entropy_loss": entropy_loss(affinity),
        }
        quantised = z + (code - z).detach()
        return Quantized(affinity, indices, quantised.transpose(1, 2).reshape(b, d, h, w), losses)

    @staticmethod
    def _rows(latents):
        """(B, D, h, w) -> unit rows (B, L, D)."""
        return F.normalize(latents.float().flatten(2).transpose(1, 2), dim=-1)


def entropy_loss(affinity):
    """Mean entropy of a row's distribution minus the entropy of their mean, P = softmax(A / 0.01), in nats (L_ent of Eq. 2).

    Minimal, -ln K, when every row is sure of its code and all codes are used alike.
    """
    logp = F.log_softmax(affinity.flatten(0, -2) / ENTROPY_TEMPERATURE, -1)  # (N, K)
    p = logp.exp()
    mean = p.mean(0)
    return -(p * logp).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
