"""How far two representations of the same samples agree: CKA, CKNNA and mutual k-nearest
neighbours.

Every function works in float64 on its inputs' device, its result lies on the CPU, and none
normalises: k-NN here ranks raw inner products, so callers usually pass `l2_normalise`d rows. Where
a denominator vanishes a scalar function raises ValueError. References: Kornblith et al. 2019 (CKA),
Song et al. 2012 (unbiased HSIC), Huh et al. 2024 (CKNNA, mutual k-NN; we follow their code, which
keeps reciprocal pairs only, not the written equation).
"""

import math
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
    """Per-image values (N,), matched and mismatched (null); NaN where a self term is not positive
    (no variance).
    """

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
    """Compare the linear kernels of two representations by HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L,
    L)).

    x: (N, p), y: (N, q), row i the same sample. The biased form lies in [0, 1] and is inflated at
    small N; the unbiased one is near 0 for independent inputs at every N and may be negative. O(N p
    q) time, no N x N matrix. ValueError if N < 4 (biased: N < 2), the inputs do not pair up or are
    not finite, or a side has no variance.
    """
    return _cka_of_orders(x, y, unbiased)()


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Compare the kernels of two representations over pairs that are k-nearest neighbours in both.

    CKNNA = S(K, L) / sqrt(S(K, K) S(L, L)), S the unbiased HSIC of the neighbour-masked kernels
    (Huh et al. 2024, code form); k = N - 1 is unbiased CKA. x: (N, p), y: (N, q). About 0 for
    independent inputs at large N, 1 for equal ones; not bounded by 1, not translation-invariant,
    symmetric only up to the direction of the edges. O(N^2 (p + q)) time, O(N k) memory. ValueError
    if N < 4, k is outside [1, N - 1], the inputs do not pair up, or a self term is not positive.
    """
    return _cknna_of_orders(x, y, k)()


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Give the mean share of a row's k nearest neighbours that are the same on both sides.

    Huh et al., 2024. x: (N, p), y: (N, q); in [0, 1], chance is k / (N - 1). ValueError if k is
    outside [1, N - 1].
    """
    return _mutual_knn_of_orders(x, y, k)()


def null(x: torch.Tensor, y: torch.Tensor, metric: Callable[..., float], draws: int = 20) -> Null:
    """Give the chance level of metric(x, y) -> float: its mean and deviation over seeded row
    permutations of y.

    Of this file's metrics, also as `partial`s with keywords, all but the relabelling of y's rows is
    computed once.
    """
    if draws < 2:
        raise ValueError("a deviation needs two draws")
    prepare = _OF_ORDERS.get(getattr(metric, "func", metric))
    value = (
        prepare(x, y, **getattr(metric, "keywords", {}))
        if prepare
        else lambda order: metric(x, y[order])
    )
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(y), generator=generator).to(y.device) for _ in range(draws))
    values = torch.tensor([value(order) for order in orders], dtype=torch.float64)
    return Null(values.mean().item(), values.std().item())


def tie_fraction(x: torch.Tensor, k: int) -> float:
    """Give the share of rows whose k-th and (k + 1)-th similarities are equal, so that the
    neighbours are arbitrary.

    x: (N, d). Above one half a k-NN metric measures little. ValueError if k is outside [1, N - 2].
    """
    (x,) = _paired(x, minimum=3)
    if not 1 <= k <= len(x) - 2:
        raise ValueError(f"k={k} is outside [1, {len(x) - 2}]")
    # (1, N, 2): the (k + 1)-th, the k-th
    values = _nearest(x.double(), k + 1).weights.topk(2, largest=False).values
    return (values.diff(dim=-1) <= ROUNDING * values.abs().max()).double().mean().item()


def within_image(
    x: torch.Tensor, y: torch.Tensor, k: int = 10, shift: int = 1, unbiased: bool = True
) -> WithinImage:
    """Align the tokens of each image separately: CKNNA, CKA and mutual k-NN (patch level, Fig. 5
    d-e).

    x: (N, L, p), y: (N, L, q), the same N images and L positions; `unbiased` is CKA's form. The
    null pairs image i of x with image (i + shift) mod N of y: two unrelated smooth maps already
    align, so report it too. Where neighbouring images share a class, shift further. ValueError if
    the inputs do not pair up or are not finite, L < 4, k is outside [1, L - 1], or shift is a
    multiple of N.
    """
    x, y = _paired(x, y, minimum=4, ndim=3)
    n, length, _ = x.shape
    if shift % n == 0:
        raise ValueError(f"shift={shift} pairs each of {n} images with itself")
    order, cycles = _order(length, x.device), math.gcd(shift, n)
    # in steps of `shift`, so that a chunk holds the images of y that its null needs: at most one
    # more than its own
    steps = torch.arange(cycles, device=x.device)[:, None] + shift * torch.arange(
        n // cycles, device=x.device
    )
    sequence, values = (steps % n).flatten(), []
    for images in sequence.split(max(1, CHUNK // length**2)):
        others, place = torch.cat([images, (images + shift) % n]).unique(return_inverse=True)
        a, b = (
            _tokens(z[rows[:, None], order].double(), k, unbiased)
            for z, rows in ((x, images), (y, others))
        )
        values.append(
            torch.cat([_compare(a, b.at(rows), unbiased) for rows in place.split(len(images))])
        )  # (6, images)
    return WithinImage(*torch.cat(values, 1)[:, sequence.argsort()].cpu())


def _paired(*inputs: torch.Tensor, minimum: int, ndim: int = 2) -> tuple[torch.Tensor, ...]:
    rows = inputs[0].shape[:-1]  # (N,) or (N, L)
    if any(z.ndim != ndim or z.shape[:-1] != rows for z in inputs) or rows[-1] < minimum:
        raise ValueError(
            f"need {ndim}-D inputs of the same >= {minimum} rows, got "
            f"{[tuple(z.shape) for z in inputs]}"
        )
    # isfinite() of all would copy them
    if not all(bound.isfinite() for z in inputs for bound in z.aminmax()):
        raise ValueError("features are not finite")
    return inputs


def _order(n: int, device: torch.device) -> torch.Tensor:
    """Seeded row order: duplicates tie, and top-k would otherwise break ties by their index."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class _Graph:
    """B directed k-NN graphs over n nodes: ascending neighbours, weights and whether an edge has
    its reverse, (B, n, k).
    """

    neighbours: torch.Tensor
    weights: torch.Tensor
    mutual: torch.Tensor

    def at(self, graphs: torch.Tensor) -> "_Graph":
        return _Graph(self.neighbours[graphs], self.weights[graphs], self.mutual[graphs])

    def permuted(self, order: torch.Tensor) -> "_Graph":
        """The graph of the rows z[order]: row i's neighbours are those of order[i], under their new
        numbers.
        """
        neighbours, place = order.argsort()[self.neighbours[:, order]].sort()
        return _Graph(
            neighbours, *(z[:, order].gather(-1, place) for z in (self.weights, self.mutual))
        )


def _neighbours(similarity: torch.Tensor, start: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most similar others of rows from `start` on and how similar, (B, R, k), given (B, R,
    n): spoils the diagonal.
    """
    if not 1 <= k < similarity.shape[-1]:
        raise ValueError(f"k={k} is outside [1, {similarity.shape[-1] - 1}]")
    similarity.diagonal(start, 1, 2).fill_(-torch.inf)
    weights, indices = similarity.topk(k)
    indices, order = indices.sort()
    return indices, weights.gather(-1, order)


def _graph(neighbours: torch.Tensor, weights: torch.Tensor) -> _Graph:
    batch, n, k = neighbours.shape
    nodes = torch.arange(n, device=neighbours.device)[:, None]
    # numbers of edges, ascending, and of their reverses
    edges, reverse = (nodes * n + neighbours, neighbours * n + nodes)
    return _Graph(
        neighbours, weights, _find(reverse.flatten(1), edges.flatten(1))[0].view(batch, n, k)
    )


def _nearest(x: torch.Tensor, k: int) -> _Graph:
    """The graph of one (n, d) input in row chunks, so that the n x n kernel never exists."""
    rows = min(len(x), max(1, 4 * CHUNK // len(x)))  # many: each product reads all of x anew
    # one for all: what is kept of a chunk would lie in another's space
    buffer, found = (x.new_empty(rows, len(x)), [])
    for start in range(0, len(x), rows):
        similarity = torch.mm(x[start : start + rows], x.T, out=buffer[: len(x) - start])
        found.append(_neighbours(similarity[None], start, k))
    return _graph(*(torch.cat(parts, 1) for parts in zip(*found)))


def _graphs(
    x: torch.Tensor, y: torch.Tensor, k: int, minimum: int
) -> tuple[_Graph, Callable[..., _Graph]]:
    """The graph of x, and that of y in any order of its rows, the rows of both shuffled."""
    shuffle = _order(len(x), x.device)
    of_x, of_y = (_nearest(z[shuffle].double(), k) for z in _paired(x, y, minimum=minimum))
    return (
        of_x,
        lambda order=None: (
            of_y if order is None else of_y.permuted(shuffle.argsort()[order[shuffle]])
        ),
    )


def _find(wanted: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each of `wanted` (.., m) is in `ascending` (.., l), and where."""
    place = torch.searchsorted(ascending, wanted).clamp_(max=ascending.shape[-1] - 1)
    return ascending.gather(-1, place) == wanted, place


def _hsic(trace: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """n (n - 3) times the unbiased HSIC (Song et al. 2012, Eq. 5) of hollow kernels P, Q; the
    factor leaves the ratio.

    trace: tr(P Q), (B,); columns, rows: column sums of P and row sums of Q, (B, n).
    """
    n = columns.shape[-1]
    terms = torch.stack(
        [
            trace,
            columns.sum(-1) * rows.sum(-1) / ((n - 1) * (n - 2)),
            -2 * (columns * rows).sum(-1) / (n - 2),
        ]
    )
    total = terms.sum(0)
    return total.masked_fill(total.abs() <= ROUNDING * terms.abs().sum(0), 0)


def _centred_hsic(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same from tr(K L) of centred kernels and their diagonals x, y (.., n): minus the hollow
    row sums.
    """
    return _hsic(cross - (x * y).sum(-1), -x, -y)


def _edge_hsic(x: _Graph, y: _Graph) -> torch.Tensor:
    """The same of sparse kernels on the edges that two graphs share, (B,): only a reciprocal edge
    enters tr(P Q).
    """
    shared, place = _find(x.neighbours, y.neighbours)
    p, q = x.weights * shared, y.weights.gather(-1, place) * shared
    reciprocal = x.mutual & y.mutual.gather(-1, place)
    columns = torch.zeros_like(p[..., 0]).scatter_add_(1, x.neighbours.flatten(1), p.flatten(1))
    return _hsic((p * q * reciprocal).sum((1, 2)), columns, q.sum(-1))


def _mutual_knn(x: _Graph, y: _Graph) -> torch.Tensor:
    return _find(x.neighbours, y.neighbours)[0].double().mean((1, 2))


def _cka_of_orders(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> Callable[..., float]:
    """Prepare CKA of x with any order of y's rows: a function of that order, as are the next
    two.
    """
    x, y = (_centred(z.double()) for z in _paired(x, y, minimum=4 if unbiased else 2))

    def hsic(a, b):
        cross = (a.T @ b).square().sum()  # = tr(K H L H)
        return _centred_hsic(cross, a.square().sum(1), b.square().sum(1)) if unbiased else cross

    norms = hsic(x, x), hsic(y, y)
    return lambda order=slice(None): _defined("CKA", _ratio(hsic(x, y[order]), *norms))


def _cknna_of_orders(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> Callable[..., float]:
    x, y = _graphs(x, y, k, 4)
    norms = _edge_hsic(x, x), _edge_hsic(y(), y())
    return lambda order=None: _defined("CKNNA", _ratio(_edge_hsic(x, y(order)), *norms))


def _mutual_knn_of_orders(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> Callable[..., float]:
    x, y = _graphs(x, y, k, 2)
    return lambda order=None: _mutual_knn(x, y(order)).item()


_OF_ORDERS = {cka: _cka_of_orders, cknna: _cknna_of_orders, mutual_knn: _mutual_knn_of_orders}


def _centred(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return (
        centred
        if centred.square().sum() > ROUNDING * x.square().sum()
        else torch.full_like(x, torch.nan)
    )


@dataclass(frozen=True)
class _Images:
    """B images seen through their tokens: neighbour graphs, centred kernels (B, L, L), and the
    norms (B,) of both.
    """

    graph: _Graph
    kernel: torch.Tensor
    norms: torch.Tensor  # (2, B): CKNNA's, CKA's

    def at(self, images: torch.Tensor) -> "_Images":
        return _Images(self.graph.at(images), self.kernel[images], self.norms[:, images])


def _tokens(x: torch.Tensor, k: int, unbiased: bool) -> _Images:
    """See (B, L, d) tokens through one Gram matrix, which becomes the centred kernel in place."""
    gram = x @ x.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    squares = diagonal.clone()
    graph = _graph(*_neighbours(gram, 0, k))
    diagonal.copy_(squares)
    means = gram.mean(-1, keepdim=True)
    gram.sub_(means).sub_(means.mT).add_(means.mean(-2, keepdim=True))
    constant = diagonal.sum(-1) <= ROUNDING * squares.sum(-1)
    norm = _kernel_hsic(gram, gram, unbiased).masked_fill(constant, torch.nan)
    return _Images(graph, gram, torch.stack([_edge_hsic(graph, graph), norm]))


def _kernel_hsic(p: torch.Tensor, q: torch.Tensor, unbiased: bool) -> torch.Tensor:
    cross = torch.linalg.vecdot(p.flatten(1), q.flatten(1))  # (B,)
    return (
        _centred_hsic(cross, *(z.diagonal(dim1=1, dim2=2) for z in (p, q))) if unbiased else cross
    )


def _compare(a: _Images, b: _Images, unbiased: bool) -> torch.Tensor:
    """CKNNA, CKA and mutual k-NN (3, B) of two sets of images."""
    cross = torch.stack([_edge_hsic(a.graph, b.graph), _kernel_hsic(a.kernel, b.kernel, unbiased)])
    return torch.cat([_ratio(cross, a.norms, b.norms), _mutual_knn(a.graph, b.graph)[None]])


def _ratio(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (cross / (x.sqrt() * y.sqrt())).masked_fill((x <= 0) | (y <= 0), torch.nan)


def _defined(name: str, value: torch.Tensor) -> float:
    if value.isnan().any():
        raise ValueError(
            f"{name} is undefined: a side has no variance, or its self-similarity is not positive"
        )
    return value.item()
