"""How far two representations of the same samples agree: CKA, CKNNA and mutual k-nearest neighbours.

Every function works in float64 and none normalises: k-NN here ranks raw inner products, so callers usually pass
`l2_normalise`d rows. Denominators carry no epsilon; where one vanishes a scalar function raises ValueError.
References: Kornblith et al. 2019 (CKA), Song et al. 2012 (unbiased HSIC), Huh et al. 2024 (CKNNA, mutual k-NN;
we follow their code, which keeps reciprocal pairs only, not the written equation).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CHUNK = 2**20  # similarities held at once: 8 MB of float64, near the cache
ROUNDING = 1e-12  # relative size below which a float64 difference is taken for zero


@dataclass(frozen=True)
class Null:
    mean: float
    std: float  # over draws, ddof 1


@dataclass(frozen=True)
class WithinImage:
    """Per-image values (N,), matched and mismatched (null); NaN where a self term is not positive (no variance)."""

    cknna: torch.Tensor
    cka: torch.Tensor
    mutual_knn: torch.Tensor
    null_cknna: torch.Tensor
    null_cka: torch.Tensor
    null_mutual_knn: torch.Tensor


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """Scale the last axis to unit length, in float64. ValueError if a vector is zero."""
    norm = x.double().norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise ValueError("a zero vector has no direction")
    return x / norm


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> float:
    """Compare the linear kernels of two representations by HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    x: (N, p), y: (N, q), row i the same sample. The biased form lies in [0, 1] and is inflated at small N; the
    unbiased one is near 0 for independent inputs at every N and may be negative. O(N p q) time, no N x N matrix.
    ValueError if N < 4 (biased: N < 2), the inputs do not pair up or are not finite, or a side has no variance.
    """
    x, y = (_centred(z.double()) for z in _paired(x, y, minimum=4 if unbiased else 2))

    def hsic(a, b):
        cross = (a.T @ b).square().sum()  # = tr(K H L H)
        return _centred_hsic(cross, a.square().sum(1), b.square().sum(1)) if unbiased else cross

    return _defined("CKA", _ratio(hsic(x, y), hsic(x, x), hsic(y, y)))


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Compare the kernels of two representations over pairs that are k-nearest neighbours in both.

    CKNNA = S(K, L) / sqrt(S(K, K) S(L, L)), S the unbiased HSIC of the neighbour-masked kernels (Huh et al. 2024,
    code form); k = N - 1 is unbiased CKA. x: (N, p), y: (N, q). About 0 for independent inputs at large N, 1 for
    equal ones; not bounded by 1, not translation-invariant, symmetric only up to the direction of the edges.
    ValueError if N < 4, k is outside [1, N - 1], the inputs do not pair up, or a self term is not positive.
    """
    return _defined("CKNNA", _cknna(*_graphs(x, y, k, 4)))


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Give the mean share of a row's k nearest neighbours that are the same on both sides (Huh et al. 2024).

    x: (N, p), y: (N, q); in [0, 1], chance is k / (N - 1). ValueError if k is outside [1, N - 1].
    """
    return _mutual_knn(*_graphs(x, y, k, 2)).item()


def null(x: torch.Tensor, y: torch.Tensor, metric: Callable[..., float], draws: int = 20) -> Null:
    """Give the chance level of metric(x, y) -> float: its mean and deviation over seeded row permutations of y."""
    if draws < 2:
        raise ValueError("a deviation needs two draws")
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(y), generator=generator).to(y.device) for _ in range(draws))
    values = torch.tensor([metric(x, y[order]) for order in orders], dtype=torch.float64)
    return Null(values.mean().item(), values.std().item())


def tie_fraction(x: torch.Tensor, k: int) -> float:
    """Give the share of rows whose k-th and (k + 1)-th similarities are equal, so that the neighbours are arbitrary.

    x: (N, d). Above one half a k-NN metric measures little. ValueError if k is outside [1, N - 2].
    """
    (x,) = _paired(x, minimum=3)
    if not 1 <= k <= len(x) - 2:
        raise ValueError(f"k={k} is outside [1, {len(x) - 2}]")
    values = _nearest(x.double(), k + 1)[1].topk(2, largest=False).values  # (1, N, 2): the (k + 1)-th, the k-th
    return (values.diff(dim=-1) <= ROUNDING * values.abs().max()).double().mean().item()


def within_image(x: torch.Tensor, y: torch.Tensor, k: int = 10, shift: int = 1) -> WithinImage:
    """Align the tokens of each image separately: CKNNA, unbiased CKA and mutual k-NN (patch level, Fig. 5 d-e).

    x: (N, L, p), y: (N, L, q), the same N images and L positions. The null pairs image i of x with image
    (i + shift) mod N of y: two unrelated smooth maps already align, so report it too. Where neighbouring images
    share a class, shift further. ValueError if the inputs do not pair up or are not finite, L < 4, k is outside
    [1, L - 1], or shift is a multiple of N.
    """
    x, y = _paired(x, y, minimum=4, ndim=3)
    n, length, _ = x.shape
    if shift % n == 0:
        raise ValueError(f"shift={shift} pairs each of {n} images with itself")
    order = _order(length, x.device)
    values = []
    for rows in torch.arange(n, device=x.device).split(max(1, CHUNK // length**2)):
        sides = (x, rows), (y, rows), (y, (rows + shift) % n)
        a, b, c = (_tokens(z[images[:, None], order], k) for z, images in sides)
        values.append(torch.stack([*_compare(a, b), *_compare(a, c)]))  # (6, images)
    return WithinImage(*torch.cat(values, 1))


def _paired(*inputs: torch.Tensor, minimum: int, ndim: int = 2) -> tuple[torch.Tensor, ...]:
    rows = inputs[0].shape[:-1]  # (N,) or (N, L)
    if any(z.ndim != ndim or z.shape[:-1] != rows for z in inputs) or rows[-1] < minimum:
        raise ValueError(f"need {ndim}-D inputs of the same >= {minimum} rows, got {[tuple(z.shape) for z in inputs]}")
    if not all(z.isfinite().all() for z in inputs):
        raise ValueError("features are not finite")
    return inputs


def _order(n: int, device: torch.device) -> torch.Tensor:
    """Seeded row order: duplicates tie, and top-k would otherwise break ties by their index."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)


# B directed k-NN graphs over n nodes: edges and weights, both (B, n, k). The edge i -> j of graph b is the number
# (b n + i) n + j; edges ascend, so a binary search tells whether one is in a graph and memory stays O(B n k).
_Graph = tuple[torch.Tensor, torch.Tensor]


def _neighbours(similarity: torch.Tensor, rows: torch.Tensor, k: int) -> _Graph:
    """The edges from some rows to their k most similar others, given the rows' similarities (B, R, n) to all."""
    batch, _, n = similarity.shape
    if not 1 <= k < n:
        raise ValueError(f"k={k} is outside [1, {n - 1}]")
    itself = rows[:, None] == torch.arange(n, device=rows.device)
    weights, indices = similarity.masked_fill(itself, -torch.inf).topk(k)
    indices, order = indices.sort()
    graph = torch.arange(batch, device=rows.device)[:, None, None]
    return (graph * n + rows[:, None]) * n + indices, weights.gather(-1, order)


def _nearest(x: torch.Tensor, k: int) -> _Graph:
    """The graph of one (n, d) input in row chunks, so that the n x n kernel never exists."""
    chunks = torch.arange(len(x), device=x.device).split(max(1, CHUNK // len(x)))
    edges, weights = zip(*(_neighbours((x[rows] @ x.T)[None], rows, k) for rows in chunks))
    return torch.cat(edges, 1), torch.cat(weights, 1)


def _graphs(x: torch.Tensor, y: torch.Tensor, k: int, minimum: int) -> list[_Graph]:
    x, y = _paired(x, y, minimum=minimum)
    order = _order(len(x), x.device)
    return [_nearest(z[order].double(), k) for z in (x, y)]


def _member(edges: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    among = among.flatten()
    return among[torch.searchsorted(among, edges).clamp(max=len(among) - 1)] == edges


def _hsic(trace: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """n (n - 3) times the unbiased HSIC (Song et al. 2012, Eq. 5) of hollow kernels P, Q; the factor leaves the ratio.

    trace: tr(P Q), (B,); columns, rows: column sums of P and row sums of Q, (B, n).
    """
    n = columns.shape[-1]
    terms = torch.stack([trace, columns.sum(-1) * rows.sum(-1) / ((n - 1) * (n - 2)), -2 * (columns * rows).sum(-1) / (n - 2)])
    total = terms.sum(0)
    return total.masked_fill(total.abs() <= ROUNDING * terms.abs().sum(0), 0)


def _centred_hsic(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same from tr(K L) of centred kernels and their diagonals x, y (.., n): minus the hollow row sums."""
    return _hsic(cross - (x * y).sum(-1), -x, -y)


def _edge_hsic(edges: torch.Tensor, p: torch.Tensor, q: torch.Tensor, batch: int, n: int) -> torch.Tensor:
    """The same for sparse kernels with values p, q on shared edges: only a reciprocal edge enters tr(P Q)."""
    source, target = edges // n, edges // n**2 * n + edges % n  # nodes numbered across the batch
    reciprocal = _member(target * n + source % n, edges)

    def total(values, nodes):
        return values.new_zeros(batch * n).index_add(0, nodes, values).view(batch, n)

    return _hsic(total(p * q * reciprocal, source).sum(1), total(p, target), total(q, source))


def _cknna(x: _Graph, y: _Graph) -> torch.Tensor:
    batch, n, _ = x[0].shape
    in_y, in_x = _member(x[0], y[0]), _member(y[0], x[0])
    shared = _edge_hsic(x[0][in_y], x[1][in_y], y[1][in_x], batch, n)
    return _ratio(shared, *(_edge_hsic(e.flatten(), w.flatten(), w.flatten(), batch, n) for e, w in (x, y)))


def _mutual_knn(x: _Graph, y: _Graph) -> torch.Tensor:
    return _member(x[0], y[0]).double().mean((1, 2))


def _centred(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred if centred.square().sum() > ROUNDING * x.square().sum() else torch.full_like(x, torch.nan)


def _tokens(x: torch.Tensor, k: int) -> tuple[_Graph, torch.Tensor]:
    """The neighbour graphs and the centred kernels (B, L, L) of (B, L, d) tokens, from one Gram matrix."""
    x = x.double()
    gram = x @ x.mT
    graph = _neighbours(gram, torch.arange(x.shape[1], device=x.device), k)
    means = gram.mean(-1, keepdim=True)
    kernel = gram - means - means.mT + means.mean(-2, keepdim=True)
    energy, raw = (z.diagonal(dim1=1, dim2=2).sum(-1) for z in (kernel, gram))
    return graph, kernel.masked_fill((energy <= ROUNDING * raw)[:, None, None], torch.nan)


def _compare(a: tuple[_Graph, torch.Tensor], b: tuple[_Graph, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """CKNNA, unbiased CKA and mutual k-NN (B,) of two sets of images seen through `_tokens`."""

    def hsic(p, q):
        return _centred_hsic((p * q).sum((1, 2)), *(z.diagonal(dim1=1, dim2=2) for z in (p, q)))

    (x, p), (y, q) = a, b
    return _cknna(x, y), _ratio(hsic(p, q), hsic(p, p), hsic(q, q)), _mutual_knn(x, y)


def _ratio(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (cross / (x.sqrt() * y.sqrt())).masked_fill((x <= 0) | (y <= 0), torch.nan)


def _defined(name: str, value: torch.Tensor) -> float:
    if value.isnan().any():
        raise ValueError(f"{name} is undefined: a side has no variance, or its self-similarity is not positive")
    return value.item()
