"""Two different statistics of a codebook: how often codes are used (the marginal), and how
confidently a token is assigned to a code (the posterior).

Figure 4 of the paper most likely shows the posterior. Both are here, under different names: `usage`
and `assignment`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 2**20  # affinities in float64 at a time: 8 MB, so that memory does not grow with N
TOP = (1, 10, 100, 1000)  # m of the top-m masses of Fig. 4


@dataclass(frozen=True)
class Usage:
    """How often each of K codes is chosen (marginal)."""

    entropy: float  # H = -sum q ln q, nats, in [0, ln K]
    effective_size: float  # exp(H), in [1, K]
    top_mass: torch.Tensor  # (K,) float64; entry m - 1 is the mass of the m most used codes
    dead: int  # number of codes never chosen; it falls with n, so compare at equal n only
    n: int  # number of tokens

    @property
    def miller_madow(self) -> float:
        """Entropy with the first-order correction (used - 1) / 2n for the finite sample, in nats
        (Miller, 1955).
        """
        return self.entropy + (len(self.top_mass) - self.dead - 1) / (2 * self.n)


@dataclass(frozen=True)
class Assignment:
    """How a token's soft assignment is spread over K codes (posterior)."""

    entropy: float  # mean of the tokens' entropies H_i, nats, in [0, ln K]
    effective_size: float  # exp(mean H_i), not mean exp(H_i), in [1, K]
    top_mass: dict[int, float]  # m -> mean posterior mass of a token's m nearest codes


def row_entropies(scores: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Return the entropy of each row of softmax(scores / tau), in nats: (..., K) -> (...).

    Values lie in [0, ln K]. Affinity.entropies computes the same, with gradients, without forming
    the matrix of scores.
    """
    return torch.special.entr((scores / tau).softmax(-1)).sum(-1)


def usage(indices: torch.Tensor, codebook_size: int) -> Usage:
    """Describe how often each code is chosen, from q_k = c_k / n (plug-in estimate).

    indices: integers in [0, K) of any shape. Raises ValueError if there are none or one is out of
    range.
    """
    indices = torch.as_tensor(indices).flatten().long()
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= codebook_size:
        raise ValueError(f"indices must be non-empty and lie in [0, {codebook_size})")
    counts = torch.bincount(indices, minlength=codebook_size).sort(descending=True).values  # (K,)
    entropy = torch.special.entr(counts.double() / len(indices)).sum().item()
    return Usage(
        entropy,
        math.exp(entropy),
        counts.cumsum(0).double() / len(indices),
        int((counts == 0).sum()),
        len(indices),
    )


def assignment(affinity, tau: float) -> Assignment:
    """Describe the soft assignment p_i = softmax(A_i / tau) of Eq. 8, averaged over tokens (Fig.
    4).

    affinity: (N, K), larger is nearer (A = -d), or an iterable of blocks of its rows, of which one
    is in memory at a time. top_mass has the keys 1, 10, 100 and 1000; a key above K counts all K
    codes. Raises ValueError if tau is not positive, affinity is not a non-empty (N, K), or an entry
    is NaN or +inf.
    """
    totals = 0
    count = 0
    for block in [affinity] if isinstance(affinity, torch.Tensor) else affinity:
        if not 0 < tau < math.inf or block.ndim != 2 or block.numel() == 0:
            raise ValueError(
                f"need tau > 0 and a non-empty (N, K) affinity, got tau={tau}, {tuple(block.shape)}"
            )
        for rows in block.split(max(1, CHUNK // block.shape[1])):
            totals = totals + _row_totals((rows.double() / tau).softmax(1))
            count += len(rows)
    if count == 0:
        raise ValueError("need a non-empty (N, K) affinity, got no blocks")
    entropy, *top_mass = (totals / count).tolist()
    if math.isnan(entropy):
        raise ValueError("affinity has an entry that is NaN or +inf")
    return Assignment(entropy, math.exp(entropy), dict(zip(TOP, top_mass)))


def _row_totals(p):
    """Return the sums over the rows of p (n, K) of the entropy and the top-m masses: (1 +
    len(TOP),).
    """
    within = [m for m in TOP if m < p.shape[1]]  # a larger m takes all mass; no sort is needed
    mass = _largest(p, max(within, default=1)).cumsum(1)[:, [m - 1 for m in within]]
    all_mass = p.sum(1, keepdim=True).expand(-1, len(TOP) - len(within))
    return torch.cat([torch.special.entr(p).sum(1, keepdim=True), mass, all_mass], 1).sum(0)


def _largest(p, count):
    """Return the `count` largest values of each row of p (n, K), descending: (n, count)."""
    if p.device.type != "cpu":
        return p.topk(count).values
    ascending = np.sort(p.detach().numpy(), axis=1)  # four times as fast as topk
    return torch.from_numpy(ascending[:, : -count - 1 : -1].copy())
