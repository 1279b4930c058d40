"""Agreement between two representations of the same samples: CKA, CKNNA and mutual k-nearest
neighbours.

Every function computes in float64 on its inputs' device and returns its result on the CPU. None
normalises its inputs: neighbours are ranked by raw inner products, so callers usually apply
`l2_normalise`. A function that returns a scalar raises ValueError where a denominator is zero.
References: Kornblith et al. 2019 (CKA), Song et al. 2012 (unbiased HSIC), Huh et al. 2024 (CKNNA,
mutual k-NN; we follow their code, which keeps reciprocal pairs only, not the written equation).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

PAIR_CHUNK = 2**23  # similarities of one side in memory at a time, where products are large
CHUNK = 2**20  # similarities in memory at a time: 8 MB of float64, about the size of a cache
ROUNDING = 1e-12  # relative size below which a float64 difference counts as zero


@dataclass(frozen=True)
class Null:
    """The chance level of a metric."""

    mean: float
    std: float  # over the draws, ddof 1


@dataclass(frozen=True)
class WithinImage:
    """Values per image (N,) of matched pairs, and of mismatched pairs (the null).

    A value is NaN where a self term is not positive, that is, without variance.
    """

    cknna: torch.Tensor
    cka: torch.Tensor
    mutual_knn: torch.Tensor
    null_cknna: torch.Tensor
    null_cka: torch.Tensor
    null_mutual_knn: torch.Tensor


@dataclass(frozen=True)
class ImagePairs:
    """Values (N, N) of image i of one side with image j of the other, NaN where undefined."""

    cknna: torch.Tensor
    cka: torch.Tensor


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """Scale the last axis to unit length, in float64. Raises ValueError if a vector is zero."""
    norm = x.double().norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise ValueError("a zero vector has no direction")
    return x / norm


def cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> float:
    """Compare the linear kernels of two representations by HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L,
    L)).

    x: (N, p), y: (N, q); row i of both is the same sample. The biased form lies in [0, 1] and is
    inflated at small N. The unbiased form is near 0 for independent inputs at every N and may be
    negative. It takes O(N p q) time and forms no N x N matrix. Raises ValueError if N < 4 (biased:
    N < 2), if the inputs have different numbers of rows or are not finite, or if either has no
    variance.
    """
    return _prepare_cka(x, y, unbiased)()


def cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Compare the kernels of two representations over pairs that are k-nearest neighbours in both.

    CKNNA = S(K, L) / sqrt(S(K, K) S(L, L)), where S is the unbiased HSIC of the neighbour-masked
    kernels (Huh et al. 2024, as in their code); k = N - 1 gives unbiased CKA. x: (N, p), y: (N, q).
    The value is about 0 for independent inputs at large N and 1 for equal inputs. It is not bounded
    by 1, not translation-invariant, and symmetric only up to the direction of the edges. It takes
    O(N^2 (p + q)) time and O(N k) memory. Raises ValueError if N < 4, k is outside [1, N - 1], the
    inputs have different numbers of rows or are not finite, or a self term is not positive.
    """
    return _prepare_cknna(x, y, k)()


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    """Return the mean share of a row's k nearest neighbours that are the same in x and y.

    x: (N, p), y: (N, q). The value lies in [0, 1]; chance is k / (N - 1) (Huh et al. 2024). Raises
    ValueError if k is outside [1, N - 1].
    """
    return _prepare_mutual_knn(x, y, k)()


def null(x: torch.Tensor, y: torch.Tensor, metric: Callable[..., float], draws: int = 20) -> Null:
    """Return the chance level of metric(x, y) -> float: its mean and standard deviation over seeded
    permutations of y's rows.

    For the metrics of this file, also as `partial`s with keywords, everything but the permutation
    is computed once. Raises ValueError for fewer than two draws.
    """
    if draws < 2:
        raise ValueError("a deviation needs two draws")
    value_of_order = prepared(metric, x, y)
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(y), generator=generator).to(y.device) for _ in range(draws))
    values = torch.tensor([value_of_order(order) for order in orders], dtype=torch.float64)
    return Null(values.mean().item(), values.std().item())


def prepared(
    metric: Callable[..., float], x: torch.Tensor, y: torch.Tensor
) -> Callable[[torch.Tensor], float]:
    """Return a function order -> metric(x, y[order]), for an order (N,) of y's rows.

    For the metrics of this file, also as `partial`s with keywords, everything but the order is
    computed once, here. Raises ValueError as the metric does.
    """
    prepare = _PREPARE.get(getattr(metric, "func", metric))
    if prepare is None:
        return lambda order: metric(x, y[order])
    return prepare(x, y, **getattr(metric, "keywords", {}))


def tie_fraction(x: torch.Tensor, k: int) -> float:
    """Return the share of rows whose k-th and (k + 1)-th similarities are equal.

    The k nearest neighbours of such a row are arbitrary; above one half, a k-NN metric measures
    little. x: (N, d). Raises ValueError if k is outside [1, N - 2].
    """
    (x,) = _paired(x, minimum=3)
    if not 1 <= k <= len(x) - 2:
        raise ValueError(f"k={k} is outside [1, {len(x) - 2}]")
    # (1, N, 2): the (k + 1)-th and the k-th similarity of each row
    values = _nearest(x.double(), k + 1).weights.topk(2, largest=False).values
    return (values.diff(dim=-1) <= ROUNDING * values.abs().max()).double().mean().item()


def within_image(
    x: torch.Tensor, y: torch.Tensor, k: int = 10, shift: int = 1, unbiased: bool = True
) -> WithinImage:
    """Measure the alignment of the tokens within each image: CKNNA, CKA and mutual k-NN (patch
    level, Fig. 5 d-e).

    x: (N, L, p), y: (N, L, q), of the same N images and L positions. unbiased: the form of CKA. The
    null pairs image i of x with image (i + shift) mod N of y. Two unrelated smooth maps already
    align, so report the null too; use a larger shift where neighbouring images share a class.
    Raises ValueError if the inputs differ in N or L or are not finite, L < 4, k is outside
    [1, L - 1], or shift is a multiple of N.
    """
    x, y = _paired(x, y, minimum=4, ndim=3)
    n, length, _ = x.shape
    if shift % n == 0:
        raise ValueError(f"shift={shift} pairs each of {n} images with itself")
    token_order = _shuffle(length, x.device)
    # Images are visited in steps of `shift`. A chunk of c images then needs only c + 1 images of y
    # for its matched pairs and its null together.
    num_cycles = math.gcd(shift, n)
    steps = torch.arange(num_cycles, device=x.device)[:, None] + shift * torch.arange(
        n // num_cycles, device=x.device
    )
    sequence = (steps % n).flatten()
    values = []
    for images in sequence.split(max(1, CHUNK // length**2)):
        partners, rows_of_y = torch.cat([images, (images + shift) % n]).unique(return_inverse=True)
        a, b = (
            _tokens(z[rows[:, None], token_order].double(), k, unbiased)
            for z, rows in ((x, images), (y, partners))
        )
        values.append(
            torch.cat([_compare(a, b.at(rows), unbiased) for rows in rows_of_y.split(len(images))])
        )  # (6, images)
    return WithinImage(*torch.cat(values, 1)[:, sequence.argsort()].cpu())


def image_pairs(x: torch.Tensor, y: torch.Tensor, k: int = 10, unbiased: bool = True) -> ImagePairs:
    """Measure CKNNA and CKA of the tokens of every image of x with those of every image of y.

    x: (N, L, p), y: (N, L, q). The diagonal holds the matched pairs of `within_image`, and any
    order of the images has its values in the table, so that a permutation test over whole images
    needs no further alignment. It takes O(N^2 L^2) time in matrix products and O(N^2) memory.
    Raises ValueError as `within_image` does.
    """
    x, y = _paired(x, y, minimum=4, ndim=3)
    length = x.shape[1]
    token_order = _shuffle(length, x.device)
    sides = [z[:, token_order].split(max(1, PAIR_CHUNK // length**2)) for z in (x, y)]
    rows = []
    for part in sides[0]:
        a = _tokens(part.double(), k, unbiased)
        blocks = [_compare_all(a, _tokens(z.double(), k, unbiased), unbiased) for z in sides[1]]
        rows.append(torch.cat(blocks, 2))
    return ImagePairs(*torch.cat(rows, 1).cpu())


def _paired(*inputs: torch.Tensor, minimum: int, ndim: int = 2) -> tuple[torch.Tensor, ...]:
    rows = inputs[0].shape[:-1]  # (N,) or (N, L)
    if any(z.ndim != ndim or z.shape[:-1] != rows for z in inputs) or rows[-1] < minimum:
        raise ValueError(
            f"need {ndim}-D inputs of the same >= {minimum} rows, got "
            f"{[tuple(z.shape) for z in inputs]}"
        )
    # the extremes suffice: isfinite() of the inputs would copy them
    if not all(bound.isfinite() for z in inputs for bound in z.aminmax()):
        raise ValueError("features are not finite")
    return inputs


def _shuffle(n: int, device: torch.device) -> torch.Tensor:
    """Return a seeded order of n rows: top-k breaks ties between equal rows by their index, which
    must not carry information.
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class _Graph:
    """B directed k-NN graphs over n nodes; all fields are (B, n, k)."""

    neighbours: torch.Tensor  # indices of nodes, ascending
    weights: torch.Tensor  # similarities
    mutual: torch.Tensor  # whether the reverse edge exists, too

    def at(self, graphs: torch.Tensor) -> "_Graph":
        return _Graph(self.neighbours[graphs], self.weights[graphs], self.mutual[graphs])

    def permuted(self, order: torch.Tensor) -> "_Graph":
        """Return the graph of the permuted rows z[order], without computing similarities again."""
        neighbours, columns = order.argsort()[self.neighbours[:, order]].sort()
        return _Graph(
            neighbours, *(z[:, order].gather(-1, columns) for z in (self.weights, self.mutual))
        )


def _neighbours(similarity: torch.Tensor, start: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k nearest neighbours of R rows and their similarities, each (B, R, k).

    similarity: (B, R, n), of the rows from `start` on to all rows; its diagonal is overwritten.
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
    edges = nodes * n + neighbours  # one number per edge, ascending
    reverse_edges = neighbours * n + nodes
    mutual, _ = _find(reverse_edges.flatten(1), edges.flatten(1))
    return _Graph(neighbours, weights, mutual.view(batch, n, k))


def _nearest(x: torch.Tensor, k: int) -> _Graph:
    """Return the graph of one input (n, d), computed by chunks of rows: the n x n kernel is never
    formed.
    """
    rows = min(len(x), max(1, 4 * CHUNK // len(x)))  # large, since each product reads all of x
    # one buffer for all chunks: the results kept of one would otherwise lie in the next one's space
    buffer = x.new_empty(rows, len(x))
    chunks = []
    for start in range(0, len(x), rows):
        similarity = torch.mm(x[start : start + rows], x.T, out=buffer[: len(x) - start])
        chunks.append(_neighbours(similarity[None], start, k))
    return _graph(*(torch.cat(parts, 1) for parts in zip(*chunks)))


def _graphs(
    x: torch.Tensor, y: torch.Tensor, k: int, minimum: int
) -> tuple[_Graph, Callable[..., _Graph]]:
    """Return the graph of x, and a function that returns the graph of y in any order of its rows.

    Both are graphs of shuffled rows; see `_shuffle`.
    """
    shuffle = _shuffle(len(x), x.device)
    graph_x, graph_y = (_nearest(z[shuffle].double(), k) for z in _paired(x, y, minimum=minimum))
    return (
        graph_x,
        lambda order=None: (
            graph_y if order is None else graph_y.permuted(shuffle.argsort()[order[shuffle]])
        ),
    )


def _find(values: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each of `values` (.., m) occurs in `ascending` (.., l), and at which index."""
    index = torch.searchsorted(ascending, values).clamp_(max=ascending.shape[-1] - 1)
    return ascending.gather(-1, index) == values, index


def _hsic(trace: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return n (n - 3) times the unbiased HSIC (Song et al. 2012, Eq. 5) of kernels P and Q with
    zero diagonals.

    The factor cancels in ratios. trace: tr(P Q), (B,). columns, rows: the column sums of P and the
    row sums of Q, (B, n).
    """
    return _hsic_of_sums(
        columns.shape[-1], trace, columns.sum(-1), rows.sum(-1), (columns * rows).sum(-1)
    )


def _hsic_of_sums(
    n: int, trace: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, products: torch.Tensor
) -> torch.Tensor:
    """Return `_hsic` from the sums over nodes of columns, of rows, and of their products."""
    terms = torch.stack([trace, columns * rows / ((n - 1) * (n - 2)), -2 * products / (n - 2)])
    total = terms.sum(0)
    return total.masked_fill(total.abs() <= ROUNDING * terms.abs().sum(0), 0)


def _centred_hsic(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `_hsic` of centred kernels K and L without their diagonals.

    cross: tr(K L). x, y: the diagonals (.., n). A row of a centred kernel sums to zero, so without
    the diagonal it sums to minus the diagonal's entry.
    """
    return _hsic(cross - (x * y).sum(-1), -x, -y)


def _edge_hsic(x: _Graph, y: _Graph) -> torch.Tensor:
    """Return `_hsic` of the sparse kernels on the edges that two graphs share, (B,).

    Only reciprocal edges contribute to tr(P Q).
    """
    shared, columns_of_y = _find(x.neighbours, y.neighbours)
    p = x.weights * shared
    q = y.weights.gather(-1, columns_of_y) * shared
    reciprocal = x.mutual & y.mutual.gather(-1, columns_of_y)
    columns = torch.zeros_like(p[..., 0]).scatter_add_(1, x.neighbours.flatten(1), p.flatten(1))
    return _hsic((p * q * reciprocal).sum((1, 2)), columns, q.sum(-1))


def _mutual_knn(x: _Graph, y: _Graph) -> torch.Tensor:
    return _find(x.neighbours, y.neighbours)[0].double().mean((1, 2))


def _prepare_cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> Callable[..., float]:
    """Return a function order -> CKA of x and y[order]; by default the rows keep their order.

    `_prepare_cknna` and `_prepare_mutual_knn` return the same for their metrics.
    """
    x, y = (_centred(z.double()) for z in _paired(x, y, minimum=4 if unbiased else 2))

    def hsic(a, b):
        cross = (a.T @ b).square().sum()  # = tr(K H L H)
        return _centred_hsic(cross, a.square().sum(1), b.square().sum(1)) if unbiased else cross

    norms = (hsic(x, x), hsic(y, y))
    return lambda order=slice(None): _defined("CKA", _ratio(hsic(x, y[order]), *norms))


def _prepare_cknna(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> Callable[..., float]:
    graph_x, graph_y = _graphs(x, y, k, 4)
    norms = (_edge_hsic(graph_x, graph_x), _edge_hsic(graph_y(), graph_y()))
    return lambda order=None: _defined("CKNNA", _ratio(_edge_hsic(graph_x, graph_y(order)), *norms))


def _prepare_mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> Callable[..., float]:
    graph_x, graph_y = _graphs(x, y, k, 2)
    return lambda order=None: _mutual_knn(graph_x, graph_y(order)).item()


_PREPARE = {cka: _prepare_cka, cknna: _prepare_cknna, mutual_knn: _prepare_mutual_knn}


def _centred(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean row; return NaN where the rows do not vary."""
    centred = x - x.mean(0)
    return (
        centred
        if centred.square().sum() > ROUNDING * x.square().sum()
        else torch.full_like(x, torch.nan)
    )


@dataclass(frozen=True)
class _Images:
    """The similarities of the tokens within each of B images."""

    graph: _Graph
    kernel: torch.Tensor  # (B, L, L), centred
    norms: torch.Tensor  # (2, B): self terms of CKNNA and of CKA

    def at(self, images: torch.Tensor) -> "_Images":
        return _Images(self.graph.at(images), self.kernel[images], self.norms[:, images])


def _tokens(x: torch.Tensor, k: int, unbiased: bool) -> _Images:
    """Compute the similarities of tokens (B, L, d); the Gram matrix is centred in place."""
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
    """Return CKNNA, CKA and mutual k-NN of two sets of B images, (3, B)."""
    cross = torch.stack([_edge_hsic(a.graph, b.graph), _kernel_hsic(a.kernel, b.kernel, unbiased)])
    return torch.cat([_ratio(cross, a.norms, b.norms), _mutual_knn(a.graph, b.graph)[None]])


def _compare_all(a: _Images, b: _Images, unbiased: bool) -> torch.Tensor:
    """Return CKNNA and CKA of all pairs of A and B images, (2, A, B)."""
    cross = torch.stack([_edge_hsic_of_all(a.graph, b.graph), _kernel_hsic_of_all(a, b, unbiased)])
    return _ratio(cross, a.norms[:, :, None], b.norms[:, None])


def _edge_hsic_of_all(x: _Graph, y: _Graph) -> torch.Tensor:
    """Return `_edge_hsic` of all pairs of A and B graphs, (A, B).

    A shared edge is a product of two indicators, so that every sum over shared edges is a matrix
    product of dense (n, n) tables of the two sides.
    """
    n = x.neighbours.shape[1]

    def dense(graph, values):
        table = graph.weights.new_zeros(len(values), n, n)
        return table.scatter_(2, graph.neighbours, values)

    trace = dense(x, x.weights * x.mutual).flatten(1) @ dense(y, y.weights * y.mutual).flatten(1).T
    weights = [dense(graph, graph.weights) for graph in (x, y)]
    edges = [dense(graph, torch.ones_like(graph.weights)) for graph in (x, y)]
    columns, rows, products = torch.zeros(3, *trace.shape, dtype=trace.dtype, device=trace.device)
    for node in range(n):
        column = weights[0][:, :, node] @ edges[1][:, :, node].T
        row = edges[0][:, node] @ weights[1][:, node].T
        columns += column
        rows += row
        products += column * row
    return _hsic_of_sums(n, trace, columns, rows, products)


def _kernel_hsic_of_all(a: _Images, b: _Images, unbiased: bool) -> torch.Tensor:
    cross = a.kernel.flatten(1) @ b.kernel.flatten(1).T  # (A, B)
    if not unbiased:
        return cross
    x, y = (z.kernel.diagonal(dim1=1, dim2=2) for z in (a, b))
    products = x @ y.T
    n = x.shape[1]
    return _hsic_of_sums(n, cross - products, -x.sum(1)[:, None], -y.sum(1)[None], products)


def _ratio(cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (cross / (x.sqrt() * y.sqrt())).masked_fill((x <= 0) | (y <= 0), torch.nan)


def _defined(name: str, value: torch.Tensor) -> float:
    if value.isnan().any():
        raise ValueError(
            f"{name} is undefined: a side has no variance, or its self-similarity is not positive"
        )
    return value.item()
