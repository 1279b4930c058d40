"""Quantizers behind one interface: an affinity A to every code, the hard index, a quantised latent
with its gradient rule.

Latents are (B, D, h, w); in rows, (B, L, D) with L = h w in raster order. Whatever the autocast
dtype, a quantizer computes in float32, so that the same latents have the same indices in training
and at inference.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gear.images import check_finite
from gear.tokenizer.readout import ENTROPY_TEMPERATURE, Affinity, full, full_precision


def as_rows(latents):
    """(B, D, h, w) -> (B, L, D)."""
    return latents.flatten(2).transpose(1, 2)


@dataclass
class Quantized:
    """What quantising gives, and what the losses need of it. Rows are (B, L, D)."""

    indices: torch.Tensor  # (B, L), the arg-max of A
    latents: torch.Tensor  # (B, D, h, w), what the decoder receives: the codes in value
    z: torch.Tensor  # rows, the latents before quantisation
    code: torch.Tensor  # rows, the chosen codes
    rows: torch.Tensor  # `latents` in rows
    affinity: Affinity  # A (Eq. 6)
    entropies: tuple | None = None  # of A, see `Affinity.entropies`; None without gradients


class Quantizer(nn.Module):
    """What every quantizer answers: `affinity`, `indices`, `codes`, `lookup`, `forward`, and
    `start` for its codebook.

    A quantizer with weights keeps them in `codebook`, (K, D).
    """

    # a latent starts as `scale` times (components, constants): see initialise_from_data
    constants, scale = (1, 1.0)
    affine = 1.0, 0.0  # the scale and the shift of A
    _rows = staticmethod(as_rows)

    @full_precision
    def affinity(self, latents, limit=None):
        """Return A (Eq. 6) as its factors, an Affinity: (B, D, h, w) -> (B, L, K) float32; `limit`
        is Affinity's.
        """
        return Affinity(self._rows(latents), self.codes(), *self.affine, limit)

    def indices(self, latents, check=True):
        """Return the index of each position (Eq. 1): (B, D, h, w) -> (B, L) int64. UserError for
        latents not finite.
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
        """Return the codebook C that latents are compared with: (K, D) float32."""
        return full(self.codebook)

    def lookup(self, indices):
        """Return the latent of each index: (B, h, w) -> (B, D, h, w)."""
        return self.codes()[indices].permute(0, 3, 1, 2)


class VectorQuantizer(Quantizer):
    """VQ with L2-normalised latents and codes (LlamaGen's VQ-16).

    A_ik = -||z_i - c_k||^2 = 2 z_i c_k - 2 on unit vectors (Eq. 6), in [-4, 0]. The decoder
    receives the unit code; its gradient passes straight through to the normalised latent and never
    to the codebook.
    """

    affine = 2.0, -2.0

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
        """Quantise latents (B, D, h, w); returns a Quantized. `limit` is Affinity's."""
        affinity = self.affinity(latents, limit)  # (B, L, K)
        indices, entropies = _assigned(affinity)
        z, code = self._rows(latents), self.codes()[indices]  # (B, L, D)
        rows = z + (code - z).detach()
        return Quantized(indices, as_maps(rows, latents), z, code, rows, affinity, entropies)

    @staticmethod
    def _rows(latents):
        return F.normalize(as_rows(latents), dim=-1)

    def start(self, rows, seed):
        """Start the codebook from latents (N, D) by k-means on the unit sphere. Returns the code of
        each, (N, D).
        """
        z = F.normalize(rows, dim=-1)
        self.codebook.copy_(F.normalize(_kmeans(z, len(self.codebook), seed), dim=-1))
        codes = self.codes().cpu()
        return codes[(z @ codes.T).argmax(-1)]


class IndexBackpropagationQuantizer(Quantizer):
    """IBQ: A_ik = z_i e_k, a plain dot product. The decoder's gradient reaches every code and the
    latent through softmax(A).

    The decoder receives (onehot + p - sg(p)) C with p = softmax(A): the code in value.
    """

    # softmax(A) has no temperature: where all codes are short it is sure of none, and its gradient
    # says little
    scale = 3.0

    def __init__(self, config):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))

    @full_precision
    def forward(self, latents, limit=None):
        """Quantise latents (B, D, h, w); returns a Quantized. `limit` is Affinity's."""
        affinity = self.affinity(latents, limit)  # (B, L, K)
        codes = self.codes()
        # p C: the codes' own gradient comes from the one-hot part
        mean = affinity.soft_readout(codes.detach(), 1.0)
        indices, entropies = _assigned(affinity)
        z, code = as_rows(latents), codes[indices]  # (B, L, D)
        rows = code + (mean - mean.detach())
        return Quantized(indices, as_maps(rows, latents), z, code, rows, affinity, entropies)

    def start(self, rows, seed):
        """Start the codebook from latents s (p, 1): s c for the k-means c of p.

        In the last place stands s + s (E|c|^2 - |c|^2) / 2.

        The largest dot product is then with the nearest c, and latents and codes are near each
        other. Returns codes (N, D).
        """
        c = _kmeans(rows[:, :-1] / self.scale, len(self.codebook), seed)
        length = c.square().sum(-1, keepdim=True)
        self.codebook.copy_(self.scale * torch.cat([c, 1 + (length.mean() - length) / 2], -1))
        codes = self.codes().cpu()
        return codes[(rows @ codes.T).argmax(-1)]


class LookupFreeQuantizer(Quantizer):
    """LFQ: the code is the signs of z, A_ik = 2 z_i c_k over all c_k in {-1, 1}^D (Open-MAGVIT2).
    It has no weights.

    Bit j of an index is set where z_j > 0, bit 0 being channel 0; of softmax(A / T) they are
    independent: see SignAffinity.
    """

    constants = 0

    def __init__(self, config):
        super().__init__()
        self.code_dim = config.code_dim

    @full_precision
    def affinity(self, latents, limit=None):
        """Return twice the dot product with every pattern of signs, an Affinity: (B, D, h, w) ->
        (B, L, K) float32.
        """
        return SignAffinity(as_rows(latents), limit)

    def _nearest(self, latents):
        return _pack(as_rows(latents) > 0)

    def codes(self):
        """Return every pattern of signs, on the CPU: (K, D) float32."""
        return _signs(torch.arange(2**self.code_dim), self.code_dim)

    def lookup(self, indices):
        """Return the signs of each index: (B, h, w) -> (B, D, h, w)."""
        return _signs(indices, self.code_dim).permute(0, 3, 1, 2)

    @full_precision
    def forward(self, latents, limit=None):
        """Quantise latents (B, D, h, w), no code formed; returns a Quantized. `limit` is
        Affinity's.
        """
        z = as_rows(latents)  # (B, L, D)
        code = torch.where(z > 0, 1.0, -1.0)
        affinity = self.affinity(latents, limit)
        entropies = affinity.entropies() if torch.is_grad_enabled() else None
        rows = z + (code - z).detach()
        return Quantized(_pack(z > 0), as_maps(rows, latents), z, code, rows, affinity, entropies)

    def start(self, rows, seed):
        """Return the code of each of the latents (N, D); there is no codebook to start."""
        return torch.where(rows > 0, 1.0, -1.0)


QUANTIZERS = {
    "vq": VectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "ibq": IndexBackpropagationQuantizer,
}


class SignAffinity(Affinity):
    """LFQ's A to latents (..., D), codes formed when asked for: softmax(A / T) is bits alone, p(+1)
    = sigmoid(4 z_j / T).
    """

    def __init__(self, rows, limit=None):
        self.rows, self.scale, self.shift, self.limit = rows, 2.0, 0.0, limit
        self.codebook_size = 2 ** rows.shape[-1]

    @functools.cached_property
    def codes(self):
        numbers = torch.arange(self.codebook_size, device=self.rows.device)
        return _signs(numbers, self.rows.shape[-1]).to(self.rows.dtype)

    def soften(self, rows, tau):
        """Return softmax(A / tau) of some rows: (n, D) -> (n, K)."""
        low, high = _joint((4 * rows / tau).sigmoid())
        return (high[:, :, None] * low[:, None]).flatten(1)

    @full_precision
    def entropies(self, tau=ENTROPY_TEMPERATURE):
        """Return what `Affinity.entropies` does, exactly, from the D independent bits."""
        logits = 4 * self.rows.flatten(0, -2) / tau  # (N, D), of +1 against -1
        p = logits.sigmoid()
        # the bits' entropies add up
        rows = (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).sum(-1)
        low, high = _joint(p)
        return rows, (high.T @ low).flatten() / len(p)  # index = high bits * 2^(D/2) + low bits


def _assigned(affinity):
    """Return the indices of an Affinity and, where there are gradients, its entropies."""
    return affinity.assign() if torch.is_grad_enabled() else (affinity.argmax(), None)


def _joint(p):
    """Probabilities (N, D) of +1 in independent bits -> of the patterns of the low half and of the
    high: (N, 2^(D/2)) each.
    """
    for half in p.split([p.shape[-1] // 2, p.shape[-1] - p.shape[-1] // 2], -1):
        joint = p.new_ones(len(p), 1)
        for bit in half.T[:, :, None]:  # (N, 1); the first turns fastest
            joint = torch.cat([joint * (1 - bit), joint * bit], -1)
        yield joint


def _pack(bits):
    return (bits * 2 ** torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _signs(indices, code_dim):
    """Unpack indices (...) into their signs (..., D), float32."""
    return (indices[..., None] >> torch.arange(code_dim, device=indices.device) & 1).float() * 2 - 1


def _kmeans(rows, count, seed):
    import sklearn.cluster  # 1.7 s, for the start of a codebook alone

    fitted = sklearn.cluster.MiniBatchKMeans(
        count, batch_size=8192, n_init=1, max_iter=20, random_state=seed
    ).fit(rows.numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def as_maps(rows, like):
    """Rows (B, L, D) -> (B, D, h, w), the grid of the latents `like`."""
    return rows.transpose(1, 2).reshape(like.shape)
