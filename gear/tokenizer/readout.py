"""The affinity A of latents to codes, and its two read-outs onto an embedding table E (GEAR Eqs. 6
to 8, Fig. 2c).

A read-out is attention: latents are the queries, codes the keys, and rows of E the values. A is
stored as its two factors, latents and codes. Results from a large A are computed by blocks of its
rows, and the blocks are computed again in the backward pass, so that no (N, K) matrix is stored.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gear.device import tensor_core_products

# largest number of elements of an A that is formed as one matrix, with autograd's own gradients; A
# is below it in all runs on scenes
WHOLE = 2**22
# number of elements in one block of a larger A: smaller blocks cost time, larger ones memory
# (benchmarks/readout.py)
BLOCK = {
    "cpu": 2**21,  # fits in a core's cache
    "cuda": 2**25,  # 128 MiB: launching a kernel takes a twentieth of the time it computes
}
ENTROPY_TEMPERATURE = 0.01  # temperature in the entropy term; tau is that of the soft read-out


def full(x):
    """Convert a floating-point tensor to float32; return float64 and anything else unchanged."""
    return (
        x.float()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
    )


def full_precision(function):
    """Decorate a function of tensors, or of an Affinity, to compute in float32 under any autocast.

    Inputs in float64 stay in float64.
    """

    @functools.wraps(function)
    def run(*args, **options):
        tensors = (x.rows if isinstance(x, Affinity) else x for x in args)
        device = next(x.device.type for x in tensors if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*map(full, args), **options)

    return run


class Affinity:
    """The affinity A_ik = scale z_i c_k + shift (Eq. 6); a larger value is nearer.

    `rows` (..., D) are the latents z and `codes` (K, D) the codes c, both of one dtype. An A of at
    most `limit` elements (default: WHOLE) is formed as one matrix; a larger one is computed by
    blocks of its rows.
    """

    def __init__(self, rows, codes, scale=1.0, shift=0.0, limit=None):
        self.rows = rows
        self.codes = codes
        self.scale = scale
        self.shift = shift
        self.codebook_size = len(codes)
        self.limit = limit

    @property
    def is_large(self):
        """Whether A is computed by blocks of its rows."""
        return self.rows[..., 0].numel() * self.codebook_size > (
            WHOLE if self.limit is None else self.limit
        )

    @functools.cached_property
    def dense(self):
        """A as one matrix (..., K), with gradients; for a large A it takes (N, K) of memory."""
        return self.of(self.rows)

    @full_precision
    def of(self, rows, tau=1.0):
        """Return A / tau of the latents `rows`: (..., D) -> (..., K)."""
        return (self.scale / tau * rows @ self.codes.T).add_(self.shift / tau)

    def soften(self, rows, tau):
        """Return softmax(A / tau) of the latents `rows`: (n, D) -> (n, K)."""
        return self.of(rows, tau).softmax(-1)

    @property
    def parts(self):
        """Slices of the N rows, each with at most BLOCK elements of A and at least one row."""
        num_rows = self.rows[..., 0].numel()
        size = max(1, BLOCK[self.rows.device.type] // self.codebook_size)
        return [slice(start, start + size) for start in range(0, num_rows, size)]

    def blocks(self):
        """Return an iterator over the blocks of rows of A, (n, K) each.

        The blocks of a large A have no gradient. A small A is one block, with its gradient.
        """
        rows = self.rows.flatten(0, -2)
        compute_block = torch.no_grad()(self.of)
        return (
            (compute_block(rows[part]) for part in self.parts)
            if self.is_large
            else iter([self.dense.flatten(0, -2)])
        )

    # -- the assignment ----------------------------------------------------------------------------

    def argmax(self):
        """Choose the code of each position, q_i = argmax_k A_ik (Eq. 1): (...) int64.

        Among equal values the first is chosen.
        """
        if self.is_large:
            return torch.cat([block.argmax(-1) for block in self.blocks()]).view(
                self.rows.shape[:-1]
            )
        return self.dense.argmax(-1)

    def soft_assignment(self, tau):
        """Return the soft assignment pi_i = softmax(A_i / tau) (Eq. 8): (..., K), rows sum to 1."""
        return (full(self.dense) / tau).softmax(-1)

    def straight_through_assignment(self, tau):
        """Return onehot + pi - sg(pi), (..., K): the one-hot assignment with the gradient of pi."""
        pi = self.soft_assignment(tau)
        onehot = F.one_hot(self.argmax(), pi.shape[-1]).to(pi.dtype)
        return onehot + (pi - pi.detach())

    @full_precision
    def entropies(self, tau=ENTROPY_TEMPERATURE):
        """Return the row entropies and the mean row of P = softmax(A / tau).

        The entropies are (N,) in nats, the mean row is (K,). Both are differentiable.
        """
        if self.is_large:
            return self.assign(tau)[1]
        log_p = F.log_softmax(full(self.dense).flatten(0, -2) / tau, -1)  # (N, K)
        p = log_p.exp()
        return -(p * log_p).sum(-1), p.mean(0)

    def assign(self, tau=ENTROPY_TEMPERATURE):
        """Return the results of `argmax` and of `entropies`, from one pass over a large A."""
        if self.is_large:
            indices, row_entropies, mean_row = _Assignment.apply(
                self.rows.flatten(0, -2), self.codes, self, tau
            )
            return indices.view(self.rows.shape[:-1]), (row_entropies, mean_row)
        return self.argmax(), self.entropies(tau)

    # -- read-outs onto an embedding table E (K, width) --------------------------------------------

    @full_precision
    def soft_readout(self, embedding, tau):
        """Return the soft read-out u^s_i = pi_i E (Eq. 8): (..., width).

        tau > 0 is in units of A. In the limit tau -> 0 the result is E_{q_i}.
        """
        if not self.is_large:
            return torch.matmul(self.soft_assignment(tau), embedding)
        u = _SoftReadout.apply(self.rows.flatten(0, -2), self.codes, embedding, self, tau)
        return u.unflatten(0, self.rows.shape[:-1])

    def straight_through_readout(self, embedding, tau):
        """Return E_{q_i} with the gradient of `soft_readout`: (..., width).

        This forms the whole (N, K) matrix.
        """
        return multiply(self.straight_through_assignment(tau), embedding)


# an assignment times E, in float32 even where the networks compute in bfloat16
multiply = full_precision(torch.matmul)


class _SoftReadout(torch.autograd.Function):
    """u = softmax(A / tau) E by blocks of rows: latents (N, D), codes (K, D), E (K, width)."""

    @staticmethod
    def forward(ctx, rows, codes, embedding, affinity, tau):
        u = rows.new_empty(len(rows), embedding.shape[1])
        for part in affinity.parts:
            pi = affinity.soften(rows[part], tau)
            with tensor_core_products():
                torch.mm(pi, embedding, out=u[part])
        ctx.save_for_backward(rows, codes, embedding, u)
        ctx.affinity, ctx.tau = affinity, tau
        return u

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        """Return the gradients to the latents, the codes and E, given g = dL/du (N, width).

        dA_ik = pi_ik (e_k g_i - u_i g_i) / tau, and dE = pi^T g. dE is computed only where E needs
        a gradient, which it does not while the tokenizer trains.
        """
        rows, codes, embedding, u = ctx.saved_tensors
        grad_embedding = torch.zeros_like(embedding) if ctx.needs_input_grad[2] else None
        grad_rows = torch.empty_like(rows)
        grad_codes = torch.zeros_like(codes)
        for part in ctx.affinity.parts:
            pi = ctx.affinity.soften(rows[part], ctx.tau)
            gi = g[part]
            ug = (u[part] * gi).sum(-1, keepdim=True)
            with tensor_core_products():
                if grad_embedding is not None:
                    grad_embedding.addmm_(pi.T, gi)
                da = torch.addmm(ug, gi, embedding.T, beta=-1).mul_(pi)
            _add_factor_gradients(da, ctx, part, rows, codes, grad_rows, grad_codes)
        return grad_rows, grad_codes, grad_embedding, None, None


class _Assignment(torch.autograd.Function):
    """Indices (N,), row entropies h (N,) and mean row (K,) of P = softmax(A / tau), by blocks."""

    @staticmethod
    def forward(ctx, rows, codes, affinity, tau):
        h = rows.new_empty(len(rows))
        mean_row = rows.new_zeros(len(codes))
        indices = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for part in affinity.parts:
            a = affinity.of(rows[part])
            indices[part] = a.argmax(-1)
            log_p = a.div_(tau).log_softmax(-1)
            p = log_p.exp()
            h[part] = -log_p.mul_(p).sum(-1)
            mean_row = mean_row + p.sum(0) / len(rows)
        ctx.save_for_backward(rows, codes, h)
        ctx.mark_non_differentiable(indices)
        ctx.affinity, ctx.tau = affinity, tau
        return indices, h, mean_row

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, _, g, w):
        """Return the gradients to the latents and the codes.

        dA_ik = p_ik (-(log p_ik + h_i) g_i + (w_k - p_i w) / N) / tau, where g (N,) is the gradient
        to the row entropies and w (K,) the gradient to the mean row.
        """
        rows, codes, h = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_codes = torch.zeros_like(codes)
        w = w / len(rows)
        for part in ctx.affinity.parts:
            log_p = ctx.affinity.of(rows[part]).div_(ctx.tau).log_softmax(-1)
            gi = g[part, None]
            p = log_p.exp()
            row_term = h[part, None] * gi + (p @ w)[:, None]
            da = log_p.mul_(-gi).add_(w).sub_(row_term).mul_(p)
            _add_factor_gradients(da, ctx, part, rows, codes, grad_rows, grad_codes)
        return grad_rows, grad_codes, None, None


def _add_factor_gradients(da, ctx, part, rows, codes, grad_rows, grad_codes):
    """Propagate one block's gradient to A, `da` / tau with `da` (n, K), to the factors of A.

    This sets dz_i = scale dA_i C for the rows of `part`, and adds scale dA^T z to dC.
    """
    torch.mm(da, codes, out=grad_rows[part]).mul_(ctx.affinity.scale / ctx.tau)
    grad_codes.addmm_(da.T, rows[part], alpha=ctx.affinity.scale / ctx.tau)
