"""Quantizers behind one interface: an affinity A to every code, the hard index, and a quantised
latent with its gradient rule.

Latents are maps (B, D, h, w) or rows (B, L, D), with L = h w in raster order. A quantizer computes
in float32 under any autocast, so that the same latents get the same indices in training and at
inference.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gear.images import check_finite
from gear.tokenizer.readout import ENTROPY_TEMPERATURE, Affinity, full, full_precision


def as_rows(latents):
    """Return latents (B, D, h, w) as rows (B, L, D)."""
    return latents.flatten(2).transpose(1, 2)


@dataclass
class Quantized:
    """Output of a quantizer: the decoder's input, and the quantities that the losses need."""

    indices: torch.Tensor  # (B, L) int64, the arg-max of A
    latents: torch.Tensor  # (B, D, h, w), input of the decoder, equal to the codes in value
    z: torch.Tensor  # (B, L, D), the latents before quantisation
    code: torch.Tensor  # (B, L, D), the chosen codes
    rows: torch.Tensor  # (B, L, D), `latents` as rows
    affinity: Affinity  # A (Eq. 6)
    entropies: tuple | None = None  # `Affinity.entropies` of A; None where gradients are disabled


class Quantizer(nn.Module):
    """Base class of the quantizers.

    Each has the methods `affinity`, `indices`, `codes`, `lookup`, `forward`, and `start`, which
    initialises its codebook. A quantizer with weights has them in `codebook`, (K, D).
    """

    # initialise_from_data starts a latent as `scale` times (principal components, `constants` ones)
    constants = 1
    scale = 1.0
    affine = (1.0, 0.0)  # the scale and the shift of A, see Affinity
    _rows = staticmethod(as_rows)

    @full_precision
    def affinity(self, latents, limit=None):
        """Return A (Eq. 6) of latents to all codes, an Affinity: (B, D, h, w) -> (B, L, K) float32.

        `limit` is that of Affinity.
        """
        return Affinity(self._rows(latents), self.codes(), *self.affine, limit)

    def indices(self, latents, check=True):
        """Return the index of each position (Eq. 1): (B, D, h, w) -> (B, L) int64.

        Raises UserError for latents that are not finite, unless `check` is false or in training
        mode.
        """
        check_finite(
            latents,
            "the latents",
            "look at the images or the tokenizer's weights",
            check and not self.training,
        )
        return self._nearest(latents)

    def _nearest(self, latents):
        return self.affinity(latents).argmax()

    def codes(self):
        """Return the codes C with which latents are compared: (K, D) float32."""
        return full(self.codebook)

    def lookup(self, indices):
        """Return the latent of each index: (B, h, w) -> (B, D, h, w)."""
        return self.codes()[indices].permute(0, 3, 1, 2)


class VectorQuantizer(Quantizer):
    """VQ with L2-normalised latents and codes (LlamaGen's VQ-16).

    A_ik = -||z_i - c_k||^2 = 2 z_i c_k - 2 on unit vectors (Eq. 6), in [-4, 0]. The decoder
    receives the unit code. The gradient of the decoder's input passes straight through to the
    normalised latent and does not reach the codebook.
    """

    affine = (2.0, -2.0)

    def __init__(self, config):
        super().__init__()
        k = config.codebook_size
        self.codebook = nn.Parameter(
            F.normalize(torch.empty(k, config.code_dim).uniform_(-1 / k, 1 / k), dim=-1)
        )

    def codes(self):
        """Return the unit rows of the codebook, (K, D) float32."""
        return F.normalize(full(self.codebook), dim=-1)

    @full_precision
    def forward(self, latents, limit=None):
        """Quantise latents (B, D, h, w); returns a Quantized. `limit` is that of Affinity."""
        affinity = self.affinity(latents, limit)  # (B, L, K)
        indices, entropies = _assign(affinity)
        z = self._rows(latents)  # (B, L, D)
        code = self.codes()[indices]  # (B, L, D)
        rows = z + (code - z).detach()
        return Quantized(indices, as_maps(rows, latents), z, code, rows, affinity, entropies)

    @staticmethod
    def _rows(latents):
        return F.normalize(as_rows(latents), dim=-1)

    def start(self, rows, seed):
        """Initialise the codebook by k-means of latents (N, D) on the unit sphere.

        Returns the code of each latent, (N, D).
        """
        z = F.normalize(rows, dim=-1)
        self.codebook.copy_(F.normalize(_kmeans(z, len(self.codebook), seed), dim=-1))
        codes = self.codes().cpu()
        return codes[(z @ codes.T).argmax(-1)]


class IndexBackpropagationQuantizer(Quantizer):
    """IBQ: A_ik = z_i c_k, a plain dot product.

    The decoder receives (onehot + p - sg(p)) C with p = softmax(A), which equals the code in value.
    Its gradient reaches every code, and the latent, through p.
    """

    # softmax(A) has no temperature: with short codes p is nearly uniform and its gradient is small
    scale = 3.0

    def __init__(self, config):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    @full_precision
    def forward(self, latents, limit=None):
        """Quantise latents (B, D, h, w); returns a Quantized. `limit` is that of Affinity."""
        affinity = self.affinity(latents, limit)  # (B, L, K)
        codes = self.codes()
        # p C, in which C is detached: as a factor it gets its gradient from the one-hot term alone
        mean_code = affinity.soft_readout(codes.detach(), 1.0)
        indices, entropies = _assign(affinity)
        z = as_rows(latents)  # (B, L, D)
        code = codes[indices]  # (B, L, D)
        rows = code + (mean_code - mean_code.detach())
        return Quantized(indices, as_maps(rows, latents), z, code, rows, affinity, entropies)

    def start(self, rows, seed):
        """Initialise the codebook from latents s (p, 1), with s = `scale`, by k-means of the p.

        The code of a cluster centre c is s (c, 1 + (E|c|^2 - |c|^2) / 2). The last channel makes
        the largest dot product that with the nearest centre, and keeps codes close to latents.
        Returns the code of each latent, (N, D).
        """
        c = _kmeans(rows[:, :-1] / self.scale, len(self.codebook), seed)
        squared_norm = c.square().sum(-1, keepdim=True)
        last_channel = 1 + (squared_norm.mean() - squared_norm) / 2
        self.codebook.copy_(self.scale * torch.cat([c, last_channel], -1))
        codes = self.codes().cpu()
        return codes[(rows @ codes.T).argmax(-1)]


class LookupFreeQuantizer(Quantizer):
    """LFQ: the code consists of the signs of z (Open-MAGVIT2). It has no weights.

    A_ik = 2 z_i c_k, over all patterns of signs c_k in {-1, 1}^D. Bit j of an index is set where
    z_j > 0, and bit 0 belongs to channel 0. Under softmax(A / T) the bits are independent, which
    SignAffinity uses.
    """

    constants = 0

    def __init__(self, config):
        super().__init__()
        self.code_dim = config.code_dim

    @full_precision
    def affinity(self, latents, limit=None):
        """Return twice the dot product of latents with every pattern of signs.

        The result is a SignAffinity: (B, D, h, w) -> (B, L, K) float32. `limit` is that of
        Affinity.
        """
        return SignAffinity(as_rows(latents), limit)

    def _nearest(self, latents):
        return _bits_to_indices(as_rows(latents) > 0)

    def codes(self):
        """Return every pattern of signs, on the CPU: (K, D) float32."""
        return _indices_to_signs(torch.arange(2**self.code_dim), self.code_dim)

    def lookup(self, indices):
        """Return the signs of each index: (B, h, w) -> (B, D, h, w)."""
        return _indices_to_signs(indices, self.code_dim).permute(0, 3, 1, 2)

    @full_precision
    def forward(self, latents, limit=None):
        """Quantise latents (B, D, h, w) without forming the codes; returns a Quantized.

        `limit` is that of Affinity.
        """
        z = as_rows(latents)  # (B, L, D)
        code = torch.where(z > 0, 1.0, -1.0)
        affinity = self.affinity(latents, limit)
        entropies = affinity.entropies() if torch.is_grad_enabled() else None
        rows = z + (code - z).detach()
        indices = _bits_to_indices(z > 0)
        return Quantized(indices, as_maps(rows, latents), z, code, rows, affinity, entropies)

    def start(self, rows, seed):
        """Return the code of each latent, (N, D) -> (N, D); there is no codebook to initialise."""
        return torch.where(rows > 0, 1.0, -1.0)


QUANTIZERS = {
    "vq": VectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "ibq": IndexBackpropagationQuantizer,
}


class SignAffinity(Affinity):
    """LFQ's A of latents (..., D) to all patterns of signs.

    Softmax(A / T) factorises over the D bits, with p(+1) = sigmoid(4 z_j / T) for bit j. The codes
    are formed only when `codes` is first read.
    """

    def __init__(self, rows, limit=None):
        self.rows = rows
        self.scale = 2.0
        self.shift = 0.0
        self.limit = limit
        self.codebook_size = 2 ** rows.shape[-1]

    @functools.cached_property
    def codes(self):
        indices = torch.arange(self.codebook_size, device=self.rows.device)
        return _indices_to_signs(indices, self.rows.shape[-1]).to(self.rows.dtype)

    def soften(self, rows, tau):
        """Return softmax(A / tau) of a block of rows: (n, D) -> (n, K)."""
        low, high = _pattern_probabilities((4 * rows / tau).sigmoid())
        return (high[:, :, None] * low[:, None]).flatten(1)

    @full_precision
    def entropies(self, tau=ENTROPY_TEMPERATURE):
        """Return the same as `Affinity.entropies`, computed exactly from the D independent bits."""
        logits = 4 * self.rows.flatten(0, -2) / tau  # (N, D), log-odds of +1 against -1
        p = logits.sigmoid()
        # the entropy of independent bits is the sum of their entropies
        row_entropies = (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).sum(-1)
        low, high = _pattern_probabilities(p)
        mean_row = (high.T @ low).flatten() / len(p)  # index = high bits * 2^(D/2) + low bits
        return row_entropies, mean_row


def _assign(affinity):
    """Return the indices of an Affinity, and its entropies or, without gradients, None."""
    return affinity.assign() if torch.is_grad_enabled() else (affinity.argmax(), None)


def _pattern_probabilities(p):
    """Yield the joint probabilities of the low half of the bits, then those of the high half.

    `p` (N, D) is the probability of +1 in each of D independent bits. Each half gives one
    probability per pattern of its D/2 bits, (N, 2^(D/2)).
    """
    for half in p.split([p.shape[-1] // 2, p.shape[-1] - p.shape[-1] // 2], -1):
        joint = p.new_ones(len(p), 1)
        for bit in half.T[:, :, None]:  # (N, 1); the first bit is the least significant one
            joint = torch.cat([joint * (1 - bit), joint * bit], -1)
        yield joint


def _bits_to_indices(bits):
    """Return the indices (...) whose binary digits are `bits` (..., D), least significant first."""
    return (bits * 2 ** torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _indices_to_signs(indices, code_dim):
    """Return the signs (..., D) of indices (...), float32."""
    return (indices[..., None] >> torch.arange(code_dim, device=indices.device) & 1).float() * 2 - 1


def _kmeans(rows, num_clusters, seed):
    """Return the cluster centres of rows (N, D) on the CPU: (num_clusters, D) float32."""
    import sklearn.cluster  # importing it takes 1.7 s, and only this function needs it

    kmeans = sklearn.cluster.MiniBatchKMeans(
        num_clusters, batch_size=8192, n_init=1, max_iter=20, random_state=seed
    ).fit(rows.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).float()


def as_maps(rows, like):
    """Return rows (B, L, D) as maps (B, D, h, w) in the shape of the latents `like`."""
    return rows.transpose(1, 2).reshape(like.shape)
