"""The autoregressive generator p(q_i | q_<i, c) over indices (Eq. 3), and the projector that maps
its tap layer to the teacher (Eq. 5).
"""

import math

import torch
from torch import nn

from gear.config import (
    UserError,
    check_range,
)
from gear.generator.condition import build_condition
from gear.generator.transformer import Block, Blocks, RMSNorm, rotation_table, visible


class Generator(nn.Module):
    """A Llama-style transformer over index grids, conditioned on a class or, with `text_slots`, on
    a caption.

    The input sequence is [condition, u_1, ..., u_{L-1}], where the condition is the embedding of a
    class or T caption slots. The last position of the condition predicts the first token, and every
    other position predicts the token after its own. The last token is therefore never an input.

    Tokens are indices, (B, L) or (B, h, w) int64, or embeddings, (B, L, D) or (B, h, w, D); L is a
    square. A condition is the input of `generator.condition`, see condition.py. `grid` (h, w) is
    the default token grid of `sample`. With `checkpointing` the blocks are computed a second time
    in the backward pass, which saves memory.
    """

    def __init__(self, config, codebook_size, checkpointing=False, grid=(16, 16)):
        super().__init__()
        self.config = config
        self.codebook_size = codebook_size
        self.checkpointing = checkpointing
        self.grid = grid
        self._tables = {}  # (grid side, length of the condition, device) -> rotation table
        width = config.width
        # the module's name, which stands in checkpoints, says what the condition is
        self._condition_name = "text_embedding" if config.text_slots else "class_embedding"
        self.add_module(self._condition_name, build_condition(config))
        self.token_embedding = nn.Embedding(codebook_size, width)  # E of Eqs. 7 and 8
        self.embed_dropout = nn.Dropout(config.dropout)
        self.blocks = Blocks(
            Block(width, config.heads, config.dropout, dual=i < config.dual_layers)
            for i in range(config.layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, codebook_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0, 0.02)
        nn.init.normal_(self.token_embedding.weight, 0, config.embed_std)
        nn.init.zeros_(self.head.weight)  # training starts from the uniform distribution, loss ln K

    @property
    def embedding(self):
        """The token embedding table E, (K, D)."""
        return self.token_embedding.weight

    @property
    def condition(self):
        """The module that embeds the condition: a ClassCondition or a CaptionCondition."""
        return getattr(self, self._condition_name)

    def forward(self, tokens, condition, mask=None, text_attention="causal", **options):
        """Return logits (B, L, K) float32 for the tokens, given their condition.

        Row i is the prediction of token i. The arguments are those of `hidden`.
        """
        last = self.config.layers
        streams = self.hidden(tokens, condition, [last], mask, text_attention, **options)
        return self.logits(streams[last])

    def logits(self, hidden):
        """Map the last residual stream (B, L, D) to logits (B, L, K) float32."""
        return self.head(self.norm(hidden)).float()

    def hidden(
        self,
        tokens,
        condition,
        layers,
        mask=None,
        text_attention="causal",
        check=True,
        dropped=None,
    ):
        """Return the residual stream after each block in `layers`, {layer: (B, L, D)}; layer 0 is
        the input of the first block.

        Row i of a stream is the position that predicts token i. Blocks above the highest of
        `layers` are not run: this is the truncated pass of Algorithm 1, line 4. With
        `text_attention` "prefix" the slots of a caption attend to each other in both directions.
        Where `dropped` (B,) bool is true the condition is replaced by none.

        Raises UserError for a layer that does not exist, a grid that is not square, and tokens or
        labels out of range. The last check waits for the device, and is therefore skipped in
        training mode and where `check` is false.
        """
        if not layers or not set(layers) <= set(range(self.config.layers + 1)):
            raise UserError(
                f"layers {sorted(layers)}: this generator has layers 0 to {self.config.layers}."
            )
        check = check and not self.training
        tokens = self.check_tokens(tokens, check)
        condition, mask = self.condition.check(condition, mask, check)
        if len(condition) != len(tokens):
            raise UserError(
                f"there are {len(tokens)} token grids and {len(condition)} conditions: one "
                "condition per grid is expected."
            )
        if dropped is not None:
            condition, mask = self.condition.drop(condition, mask, dropped)
        prefix = self.condition.embed(condition)  # (B, C, D)
        u = tokens[:, :-1] if tokens.is_floating_point() else self.hard_readout(tokens[:, :-1])
        x = self.embed_dropout(torch.cat([prefix, u], 1))
        c = prefix.shape[1]
        table = self.rotation(tokens.shape[1], x.device, c)[: x.shape[1]]
        attention_mask = None if mask is None else visible(mask, u.shape[1], text_attention)
        text = c if self.condition.is_caption else 0
        recompute = self.checkpointing and torch.is_grad_enabled()
        streams = self.blocks(x, table, layers, mask=attention_mask, text=text, recompute=recompute)
        return {i: x[:, c - 1 :] if c > 1 else x for i, x in streams.items()}

    def hard_readout(self, indices):
        """Return the hard read-out u^h_i = E_{q_i} (Eq. 7): indices (...) -> (..., D).

        No gradient reaches the network that chose the indices.
        """
        return self.token_embedding(indices)

    def check_tokens(self, tokens, check=True):
        """Return tokens as sequences: indices (B, L) int64, or embeddings (B, L, D).

        Raises UserError for tokens of another shape, and, with `check`, for indices out of range.
        """
        is_soft = tokens.is_floating_point()
        if tokens.ndim == 3 + is_soft and tokens.shape[1] != tokens.shape[2]:
            raise UserError(
                f"a grid of {tokens.shape[1]} x {tokens.shape[2]} tokens is not square."
            )
        if (
            tokens.ndim not in (2 + is_soft, 3 + is_soft)
            or tokens.numel() == 0
            or (is_soft and tokens.shape[-1] != self.config.width)
        ):
            width = self.config.width
            raise UserError(
                f"tokens have shape {tuple(tokens.shape)}: indices (B, L) or (B, h, w), or "
                f"embeddings (B, L, {width}) or (B, h, w, {width}) are expected."
            )
        tokens = tokens.flatten(1, tokens.ndim - 1 - is_soft)
        if not is_soft and check:
            check_range(tokens, self.codebook_size, "indices")
        return tokens if is_soft else tokens.long()

    def rotation(self, length, device, condition=1):
        """Return the rotation table of a sequence of `condition` positions and `length` tokens.

        Raises UserError if `length` is not a square.
        """
        side = math.isqrt(length)
        if side * side != length:
            raise UserError(f"a sequence of {length} tokens is not a square grid.")
        head_dim = self.config.width // self.config.heads
        key = (side, condition, device)
        if key not in self._tables:  # computing a table takes thirty small kernels
            self._tables[key] = rotation_table(
                side, head_dim, condition, self.config.condition_rotation, device=device
            )
        return self._tables[key]


class Projector(nn.Module):
    """g_phi of Eq. 5: residual stream at the tap layer (B, L, D) -> teacher space (B, L,
    target_dim).
    """

    def __init__(self, config, target_dim):
        super().__init__()
        d, h = config.width, config.projector_dim
        self.layers = nn.Sequential(
            nn.Linear(d, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, target_dim)
        )  # fmt: skip

    def forward(self, hidden):
        return self.layers(hidden)


class Projectors(nn.ModuleList):
    """One Projector per teacher, their outputs concatenated: (B, L, D) -> (B, L, sum of dims)."""

    def forward(self, hidden):
        return torch.cat([projector(hidden) for projector in self], -1)
