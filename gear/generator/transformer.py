"""The parts of a Llama-style transformer: RMSNorm, 2-D RoPE, causal attention with a KV cache, and
SwiGLU.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gear.config import UserError

# Llama's eps; PyTorch's default is the machine epsilon of float32, 1.2e-7
RMSNorm = functools.partial(nn.RMSNorm, eps=1e-5)


def rotation_table(
    side, head_dim, condition=1, condition_rotation="identity", base=10_000.0, device=None
):
    """Return the (cos, sin) table of 2-D RoPE, (condition + side^2, head_dim / 2, 2).

    Its rows are `condition` positions, then side * side tokens in raster order. The first half of
    a token's channel pairs is rotated by angles proportional to its row, the second half by angles
    proportional to its column. The condition has no position in the image: "identity" leaves its
    queries and keys unrotated, and "zero" multiplies them by zero, as the public networks do, so
    that its keys carry no information.
    """
    half = head_dim // 2
    # (head_dim / 4,)
    frequencies = base ** (-torch.arange(0, half, 2, device=device).float() / half)
    position = torch.arange(side, device=device).float()
    axis_angles = position[:, None] * frequencies  # (side, head_dim / 4)
    row_angles = axis_angles[:, None].expand(-1, side, -1)
    column_angles = axis_angles[None].expand(side, -1, -1)
    angles = torch.cat([row_angles, column_angles], -1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], -1)  # (side^2, head_dim / 2, 2)
    condition_row = torch.zeros_like(table[:1])
    if condition_rotation == "identity":
        condition_row[..., 0] = 1
    return torch.cat([condition_row.expand(condition, -1, -1), table])


def rotate(x, table):
    """Rotate interleaved channel pairs of x (..., S, head_dim) by `table` (S, head_dim / 2, 2).

    The rotation is computed in float32 and returned in the type of x.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the positions processed so far.

    `keys` and `values` are (B, heads, S_max, head_dim); their first `length` positions are filled.
    """

    def __init__(self, batch, heads, length, head_dim, device, dtype):
        self.keys = torch.empty(batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """Store keys and values of the next positions; return those of all positions so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, batch):
        """Keep the first `batch` sequences only."""
        self.keys = self.keys[:batch]
        self.values = self.values[:batch]


def visible(mask, tokens, text_attention):
    """Return which position may attend to which: mask (B, T) -> (B, 1, S, S) bool.

    The S positions are T caption slots, then `tokens` image tokens. Attention is causal, and no
    position except itself attends to an empty slot. With "prefix" the slots of a caption attend to
    each other in both directions. Text never attends to the image. Raises UserError for another
    value of `text_attention`.
    """
    if text_attention not in ("causal", "prefix"):
        raise UserError(f"text_attention is '{text_attention}': 'causal' or 'prefix' is expected.")
    slots = mask.shape[1]
    size = slots + tokens
    in_order = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    if text_attention == "prefix":
        in_order[:slots, :slots] = True
    is_filled = torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)  # (B, S)
    is_self = torch.eye(size, dtype=torch.bool, device=mask.device)
    return (in_order & is_filled[:, None] | is_self)[:, None]


class Attention(nn.Module):
    """Causal multi-head self-attention with rotated queries and keys, and without biases.

    In a dual-stream layer the first `text` positions have separate projections; the attention
    itself runs over all positions jointly.
    """

    def __init__(self, width, heads, dropout, dual=False):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.qkv_text = nn.Linear(width, 3 * width, bias=False) if dual else None
        self.out_text = nn.Linear(width, width, bias=False) if dual else None

    def forward(self, x, table, cache=None, mask=None, text=0):
        qkv = by_stream(x, text, self.qkv_text, self.qkv)
        # (2 or 1, B, heads, S, head_dim)
        qk, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))
        q, k = rotate(qk, table)  # rotating both together takes half the kernels
        v = v.squeeze(0)
        if cache is not None:
            k, v = cache.append(k, v)
        # a single new position attends to the whole cache, which needs no causal mask
        is_causal = mask is None and q.shape[2] == k.shape[2] > 1
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.dropout(by_stream(h.transpose(1, 2).flatten(2), text, self.out_text, self.out))


def by_stream(x, text, text_module, image_module):
    """Apply `text_module` to the first `text` positions of x (B, S, D) and `image_module` to the
    others.

    `image_module` is applied to all positions if `text_module` is None.
    """
    if text_module is None or text == 0:
        return image_module(x)
    return torch.cat([text_module(x[:, :text]), image_module(x[:, text:])], 1)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases.

    The hidden width is 8/3 of the model's, rounded up to a multiple of 256, or of 32 in models
    narrower than 256.
    """

    def __init__(self, width, dropout):
        super().__init__()
        multiple = 256 if width >= 256 else 32
        hidden = -(-int(8 * width / 3) // multiple) * multiple
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """One pre-norm transformer layer.

    In a dual-stream layer text and image share the feed-forward network.
    """

    def __init__(self, width, heads, dropout, dual=False):
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, dropout, dual)
        self.attention_norm_text = RMSNorm(width) if dual else None
        self.ffn_norm = RMSNorm(width)
        self.ffn = SwiGLU(width, dropout)

    def forward(self, x, table, cache=None, mask=None, text=0):
        h = by_stream(x, text, self.attention_norm_text, self.attention_norm)
        x = x + self.attention(h, table, cache, mask, text)
        return x + self.ffn(self.ffn_norm(x))


class Blocks(nn.ModuleList):
    """The transformer layers in sequence, called as one network so that they can be sharded over
    processes.
    """

    def forward(self, x, table, layers, caches=None, mask=None, text=0, recompute=False):
        """Return the residual stream (B, S, D) after each block in `layers`, {layer: stream}.

        Layer 0 is x. Blocks above the highest of `layers` are not run. `caches` has one KVCache per
        block. With `recompute` a block stores its input only and is run again in the backward pass.
        """
        streams = {0: x} if 0 in layers else {}
        for i, block in zip(range(1, max(layers) + 1), self):
            if caches:  # bypass a compiled block, which would be compiled for every cache length
                block = block._call_impl
            if recompute:
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, table, caches[i - 1] if caches else None, mask, text)
            if i in layers:
                streams[i] = x
        return streams
