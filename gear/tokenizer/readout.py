"""The affinity A of latents to codes, and its two read-outs onto an embedding table E (GEAR Eqs. 6
to 8, Fig. 2c).

A read-out is attention: latents are queries, codes keys, E the values. A is kept as its factors;
what is read from a large one is computed by blocks of rows, and again in backward, so that no (N,
K) is held.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gear.device import tensor_core_products

# elements up to which A is formed whole, with autograd's own gradients: those of all scenes runs
WHOLE = 2**22
# elements formed at once of a larger A: fewer cost time, more cost memory (benchmarks/readout.py)
BLOCK = {
    "cpu": 2**21,  # what a core's cache holds
    "cuda": 2**25,  # 128 MiB: launching a kernel takes as long as a twentieth of computing it
}
ENTROPY_TEMPERATURE = 0.01  # of the entropy term; not the guidance temperature tau


def full(x):
    """Return a tensor of floats in float32, but float64 as it is; anything else as it is."""
    return (
        x.float()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
    )


def full_precision(function):
    """Run a function of tensors, or of an Affinity, in float32 (float64 where they are), autocast
    or not.
    """

    @functools.wraps(function)
    def run(*args, **options):
        tensors = (x.rows if isinstance(x, Affinity) else x for x in args)
        device = next(x.device.type for x in tensors if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*map(full, args), **options)

    return run


class Affinity:
    """A_ik = scale z_i c_k + shift (Eq. 6), larger is nearer: latents z in rows (..., D), codes (K,
    D), of one dtype.

    Up to `limit` elements (default: WHOLE) A is formed whole; a larger one is read by blocks of its
    rows.
    """

    def __init__(self, rows, codes, scale=1.0, shift=0.0, limit=None):
        self.rows, self.codes, self.scale, self.shift = rows, codes, scale, shift
        self.codebook_size, self.limit = len(codes), limit

    @property
    def is_large(self):
        """Whether A is read by blocks of its rows."""
        return self.rows[..., 0].numel() * self.codebook_size > (
            WHOLE if self.limit is None else self.limit
        )

    @functools.cached_property
    def dense(self):
        """A itself, (..., K), with its gradients: for a small A, and for those who cannot do
        without.
        """
        return self.of(self.rows)

    @full_precision
    def of(self, rows, tau=1.0):
        """Return A / tau of some rows: (..., D) -> (..., K)."""
        return (self.scale / tau * rows @ self.codes.T).add_(self.shift / tau)

    def soften(self, rows, tau):
        """Return softmax(A / tau) of some rows: (n, D) -> (n, K)."""
        return self.of(rows, tau).softmax(-1)

    @property
    def parts(self):
        """Slices of the N rows whose A is at most BLOCK elements, one row at least."""
        count = self.rows[..., 0].numel()
        size = max(1, BLOCK[self.rows.device.type] // self.codebook_size)
        return [slice(start, start + size) for start in range(0, count, size)]

    def blocks(self):
        """Return an iterator over A by blocks of its rows, (n, K): those of a large A have no
        gradient.
        """
        rows, of = self.rows.flatten(0, -2), torch.no_grad()(self.of)
        return (
            (of(rows[part]) for part in self.parts)
            if self.is_large
            else iter([self.dense.flatten(0, -2)])
        )

    # -- the assignment ----------------------------------------------------------------------------

    def argmax(self):
        """Choose each position's code, q_i = argmax_k A_ik (Eq. 1): (...) int64; the first of
        equals.
        """
        if self.is_large:
            return torch.cat([block.argmax(-1) for block in self.blocks()]).view(
                self.rows.shape[:-1]
            )
        return self.dense.argmax(-1)

    def soft_assignment(self, tau):
        """Soften the assignment, pi_i = softmax(A_i / tau) (Eq. 8): (..., K), rows sum to 1."""
        return (full(self.dense) / tau).softmax(-1)

    def straight_through_assignment(self, tau):
        """One-hot in value, softmax(A / tau) in gradient: onehot + pi - sg(pi), (..., K)."""
        pi = self.soft_assignment(tau)
        onehot = F.one_hot(self.argmax(), pi.shape[-1]).to(pi.dtype)
        return onehot + (pi - pi.detach())

    @full_precision
    def entropies(self, tau=ENTROPY_TEMPERATURE):
        """Return the entropies of the rows of P = softmax(A / tau) in nats, (N,), and its mean row,
        (K,): differentiable.
        """
        if self.is_large:
            return self.assign(tau)[1]
        logp = F.log_softmax(full(self.dense).flatten(0, -2) / tau, -1)  # (N, K)
        p = logp.exp()
        return -(p * logp).sum(-1), p.mean(0)

    def assign(self, tau=ENTROPY_TEMPERATURE):
        """Return `argmax` and `entropies` from one pass over A."""
        if self.is_large:
            indices, rows, mean = _Assignment.apply(self.rows.flatten(0, -2), self.codes, self, tau)
            return indices.view(self.rows.shape[:-1]), (rows, mean)
        return self.argmax(), self.entropies(tau)

    # -- read-outs onto an embedding table E (K, width) --------------------------------------------

    @full_precision
    def soft_readout(self, embedding, tau):
        """u^s_i = pi_i E (Eq. 8): (..., width); tau > 0, in units of A; equal to E_{q_i} in the
        limit of tau = 0.
        """
        if not self.is_large:
            return torch.matmul(self.soft_assignment(tau), embedding)
        rows = _SoftReadout.apply(self.rows.flatten(0, -2), self.codes, embedding, self, tau)
        return rows.unflatten(0, self.rows.shape[:-1])

    def straight_through_readout(self, embedding, tau):
        """E_{q_i} in value, with the gradient of `soft_readout`: (..., width). Forms (N, K)."""
        return multiply(self.straight_through_assignment(tau), embedding)


multiply = full_precision(torch.matmul)  # a read-out, whatever the networks compute in


class _SoftReadout(torch.autograd.Function):
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
        """dA_ik = pi_ik (e_k g_i - u_i g_i) / tau; dE = pi^T g, where E asks for it: while the
        tokenizer trains it does not.
        """
        rows, codes, embedding, u = ctx.saved_tensors
        to_embedding = torch.zeros_like(embedding) if ctx.needs_input_grad[2] else None
        to_rows, to_codes = torch.empty_like(rows), torch.zeros_like(codes)
        for part in ctx.affinity.parts:
            pi, gi = ctx.affinity.soften(rows[part], ctx.tau), g[part]
            ug = (u[part] * gi).sum(-1, keepdim=True)
            with tensor_core_products():
                if to_embedding is not None:
                    to_embedding.addmm_(pi.T, gi)
                da = torch.addmm(ug, gi, embedding.T, beta=-1).mul_(pi)
            _to_factors(da, ctx, part, rows, codes, to_rows, to_codes)
        return to_rows, to_codes, to_embedding, None, None


class _Assignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, codes, affinity, tau):
        h, mean = rows.new_empty(len(rows)), rows.new_zeros(len(codes))
        indices = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for part in affinity.parts:
            a = affinity.of(rows[part])
            indices[part] = a.argmax(-1)
            logp = a.div_(tau).log_softmax(-1)
            p = logp.exp()
            h[part], mean = -logp.mul_(p).sum(-1), mean + p.sum(0) / len(rows)
        ctx.save_for_backward(rows, codes, h)
        ctx.mark_non_differentiable(indices)
        ctx.affinity, ctx.tau = affinity, tau
        return indices, h, mean

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, _, g, w):
        """dA_ik = p_ik (-(log p_ik + h_i) g_i + (w_k - p_i w) / N) / tau, with w the gradient to
        the mean row.
        """
        rows, codes, h = ctx.saved_tensors
        to_rows, to_codes, w = torch.empty_like(rows), torch.zeros_like(codes), w / len(rows)
        for part in ctx.affinity.parts:
            logp, gi = ctx.affinity.of(rows[part]).div_(ctx.tau).log_softmax(-1), g[part, None]
            p = logp.exp()
            of_row = h[part, None] * gi + (p @ w)[:, None]
            _to_factors(
                logp.mul_(-gi).add_(w).sub_(of_row).mul_(p),
                ctx,
                part,
                rows,
                codes,
                to_rows,
                to_codes,
            )
        return to_rows, to_codes, None, None


def _to_factors(da, ctx, part, rows, codes, to_rows, to_codes):
    """dz_i = scale dA_i C, and dC += scale dA^T z over the rows of one part; `da` (n, K) is tau
    dA.
    """
    torch.mm(da, codes, out=to_rows[part]).mul_(ctx.affinity.scale / ctx.tau)
    to_codes.addmm_(da.T, rows[part], alpha=ctx.affinity.scale / ctx.tau)
