"""What a generator is told of an image before its first token: a class, or a caption's features."""

import torch
from torch import nn

from gear.config import UserError, check_range


def build_condition(config):
    """Return the ClassCondition or the CaptionCondition of a GeneratorConfig."""
    return CaptionCondition(config) if config.text_slots else ClassCondition(config)


class ClassCondition(nn.Embedding):
    """A class per image, labels (B,) int64, embedded in one position; the last row stands for "no
    class".
    """

    is_caption = False

    def __init__(self, config):
        super().__init__(config.num_classes + 1, config.width)
        self.no_class = config.num_classes

    def check(self, labels, mask=None, check=True):
        """Return (labels, None); raises UserError for what are no labels, or, with `check`, for
        labels out of range.
        """
        if mask is not None or labels.ndim != 1 or labels.numel() == 0:
            raise UserError(
                "this generator is conditioned on a class: give it labels (B,), and no mask."
            )
        if check:
            check_range(labels, self.no_class + 1, "labels")
        return labels.long(), None

    def embed(self, labels):
        """Embed labels (B,): (B, 1, D)."""
        return self(labels)[:, None]

    def none(self, labels, mask=None):
        """Return (labels, None) that stand for no class, as many as are given."""
        return torch.full_like(labels, self.no_class), None

    def drop(self, labels, mask, dropped):
        """Return (labels, None), those replaced by none where `dropped` (B,) bool is true."""
        return torch.where(dropped, self.none(labels)[0], labels), None


class CaptionCondition(nn.Sequential):
    """A caption per image, features (B, T, F) of a text encoder, projected to T positions.

    `mask` (B, T) bool is true where a slot is filled (default: all); captions are padded on either
    side.
    """

    is_caption = True

    def __init__(self, config):
        width = config.width
        super().__init__(
            nn.Linear(config.text_dim, width, bias=False),
            nn.GELU("tanh"),
            nn.Linear(width, width, bias=False),
        )
        self.slots, self.dim = config.text_slots, config.text_dim
        self.no_caption = None  # (features (T, F), mask (T,)) of the empty text: its user sets it

    def check(self, features, mask=None, check=True):
        """Return (features, mask), the mask filled in; raises UserError for what this generator
        cannot take.
        """
        if (
            not features.is_floating_point()
            or features.ndim != 3
            or features.shape[2] != self.dim
            or features.numel() == 0
        ):
            found = (
                f"features (B, T, {self.dim}) are expected, not {tuple(features.shape)} "
                f"{features.dtype}"
            )
            raise UserError(f"this generator is conditioned on captions: {found}.")
        if features.shape[1] > self.slots:
            raise UserError(
                f"a caption of {features.shape[1]} tokens is longer than the {self.slots} slots: "
                f"cut it to {self.slots}."
            )
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if mask.shape != features.shape[:2] or mask.is_floating_point():
            found = f"{tuple(mask.shape)} {mask.dtype}"
            raise UserError(
                f"the mask is {found}, the captions have {tuple(features.shape[:2])} slots: true "
                "is filled."
            )
        return features, mask.bool()

    def embed(self, features):
        """Project captions (B, T, F): (B, T, D)."""
        return self(features.to(self[0].weight.dtype))

    def none(self, features, mask):
        """Return (features, mask) that stand for no caption, in the shape of those given.

        Raises UserError where `no_caption` is not set: the public networks take the text encoder's
        features of "", and zeros would be no substitute (a network without biases is blind to its
        weights there).
        """
        if self.no_caption is None:
            what = (
                "Set generator.condition.no_caption = (features, mask), the text encoder's of ''."
            )
            raise UserError(f"what is no caption? {what}")
        none, filled = (part.to(features.device) for part in self.no_caption)
        if none.shape != features.shape[1:] or filled.shape != mask.shape[1:]:
            found = f"{tuple(none.shape)}, {tuple(filled.shape)}"
            raise UserError(
                f"no_caption has the shapes {found}, a caption has {tuple(features.shape[1:])}: as "
                "many slots."
            )
        return none.to(features.dtype).expand_as(features), filled.bool().expand_as(mask)

    def drop(self, features, mask, dropped):
        """Return (features, mask), those replaced by none where `dropped` (B,) bool is true."""
        none, empty = self.none(features, mask)
        return torch.where(dropped[:, None, None], none, features), torch.where(
            dropped[:, None], empty, mask
        )
