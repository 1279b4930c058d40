"""Which codes are used (marginal), and how surely a token is assigned to one (posterior): two
different statistics.

Figure 4 of the paper most likely shows the posterior family; both are kept, under names that cannot
be confused.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 2**20  # affinities held in float64 at once: 8 MB, so that memory does not grow with N
TOP = (1, 10, 100, 1000)  # m of the top-m masses of Fig. 4


@dataclass(frozen=True)
class Usage:
    entropy: float  # H = -sum q ln q, nats, in [0, ln K]
    effective_size: float  # exp(H), in [1, K]
    top_mass: torch.Tensor  # (K,) float64; entry m - 1 is the mass of the m most used codes
    dead: int  # codes never chosen; falls with n, so compare at equal n only
    n: int  # tokens counted

    @property
    def miller_madow(self) -> float:
        """Entropy with the first-order correction (used - 1) / 2n for the finite sample, in nats
        (Miller, 1955).
        """
        return self.entropy + (len(self.top_mass) - self.dead - 1) / (2 * self.n)


@dataclass(frozen=True)
class Assignment:
    entropy: float  # mean over tokens of H_i, nats, in [0, ln K]
    effective_size: float  # exp(mean H_i), not mean exp(H_i), in [1, K]
    top_mass: dict[int, float]  # m -> mean posterior mass of a token's own m nearest codes


def row_entropies(scores: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Return the entropy of each row of softmax(scores / tau) in nats: (..., K) -> (...), in [0, ln
    K].

    Affinity.entropies is the same with gradients, for matrices that are not formed.
    """
    return torch.special.entr((scores / tau).softmax(-1)).sum(-1)


def usage(indices: torch.Tensor, codebook_size: int) -> Usage:
    """Describe how often each code is chosen, from q_k = c_k / n (plug-in estimate).

    indices: integers in [0, K) of any shape. ValueError if there are none, or one is out of range.
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

    affinity: (N, K), larger is nearer (A = -d), or an iterable of its blocks of rows, one of which
    is held at a time. top_mass has m = 1, 10, 100, 1000; an m above K counts all K codes.
    ValueError if tau is not positive, affinity is not a non-empty (N, K), or an entry is NaN or
    +inf.
    """
    totals, count = 0, 0
    for block in [affinity] if isinstance(affinity, torch.Tensor) else affinity:
        if not 0 < tau < math.inf or block.ndim != 2 or block.numel() == 0:
            raise ValueError(
                f"need tau > 0 and a non-empty (N, K) affinity, got tau={tau}, {tuple(block.shape)}"
            )
        for rows in block.split(max(1, CHUNK // block.shape[1])):
            totals, count = (
                totals + _row_totals((rows.double() / tau).softmax(1)),
                count + len(rows),
            )
    if count == 0:
        raise ValueError("need a non-empty (N, K) affinity, got no block of one")
    entropy, *top_mass = (totals / count).tolist()
    if math.isnan(entropy):
        raise ValueError("affinity has an entry that is NaN or +inf")
    return Assignment(entropy, math.exp(entropy), dict(zip(TOP, top_mass)))


def _row_totals(p):
    """Sum over rows of p (n, K) the entropy and the top-m masses: (1 + len(TOP),)."""
    within = [m for m in TOP if m < p.shape[1]]  # a larger m takes all mass, without a full sort
    mass = _largest(p, max(within, default=1)).cumsum(1)[:, [m - 1 for m in within]]
    all_mass = p.sum(1, keepdim=True).expand(-1, len(TOP) - len(within))
    return torch.cat([torch.special.entr(p).sum(1, keepdim=True), mass, all_mass], 1).sum(0)


def _largest(p, count):
    """Return the `count` largest of each row of p (n, K), falling: (n, count)."""
    if p.device.type != "cpu":
        return p.topk(count).values
    rising = np.sort(p.detach().numpy(), axis=1)  # topk's values in a quarter of its time
    return torch.from_numpy(rising[:, : -count - 1 : -1].copy())
