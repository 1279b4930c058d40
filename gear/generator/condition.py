"""The condition of a generator, which precedes the tokens: a class, or a caption's features."""

import torch
from torch import nn

from gear.config import UserError, check_range


def build_condition(config):
    """Return the ClassCondition or the CaptionCondition of a GeneratorConfig."""
    return CaptionCondition(config) if config.text_slots else ClassCondition(config)


class ClassCondition(nn.Embedding):
    """Embedding of one class per image: labels (B,) int64 take one position each.

    The last row of the table stands for "no class".
    """

    is_caption = False

    def __init__(self, config):
        super().__init__(config.num_classes + 1, config.width)
        self.no_class = config.num_classes

    def check(self, labels, mask=None, check=True):
        """Return (labels, None), the labels as int64.

        Raises UserError unless `labels` has the shape (B,) and `mask` is None, and, with `check`,
        for labels out of range.
        """
        if mask is not None or labels.ndim != 1 or labels.numel() == 0:
            raise UserError(
                "this generator is conditioned on a class: give it one label per image, of "
                "shape (B,) with B >= 1, and no mask."
            )
        if check:
            check_range(labels, self.no_class + 1, "labels")
        return labels.long(), None

    def embed(self, labels):
        """Embed labels: (B,) -> (B, 1, D)."""
        return self(labels)[:, None]

    def none(self, labels, mask=None):
        """Return (labels, None) in which every label stands for "no class"."""
        return torch.full_like(labels, self.no_class), None

    def drop(self, labels, mask, dropped):
        """Return (labels, None), with "no class" where `dropped` (B,) bool is true."""
        return torch.where(dropped, self.none(labels)[0], labels), None


class CaptionCondition(nn.Sequential):
    """Projection of one caption per image: features (B, T, F) of a text encoder to T positions.

    A mask (B, T) bool is true for the slots that are filled (default: all). Captions may be padded
    on either side.
    """

    is_caption = True

    def __init__(self, config):
        width = config.width
        super().__init__(
            nn.Linear(config.text_dim, width, bias=False),
            nn.GELU("tanh"),
            nn.Linear(width, width, bias=False),
        )
        self.slots = config.text_slots
        self.dim = config.text_dim
        self.no_caption = None  # (features (T, F), mask (T,)) of the empty text, set by the user

    def check(self, features, mask=None, check=True):
        """Return (features, mask), with a mask of all slots if none is given.

        Raises UserError for features or a mask of a wrong type or shape, and for captions that are
        longer than `text_slots`.
        """
        if (
            not features.is_floating_point()
            or features.ndim != 3
            or features.shape[2] != self.dim
            or features.numel() == 0
        ):
            raise UserError(
                "this generator is conditioned on captions: floating-point features "
                f"(B, T, {self.dim}) are expected, not {tuple(features.shape)} {features.dtype}."
            )
        if features.shape[1] > self.slots:
            raise UserError(
                f"a caption of {features.shape[1]} tokens is longer than the {self.slots} slots: "
                f"cut it to {self.slots}."
            )
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if mask.shape != features.shape[:2] or mask.is_floating_point():
            raise UserError(
                f"the mask is {tuple(mask.shape)} {mask.dtype}, the captions have "
                f"{tuple(features.shape[:2])} slots: give one bool per slot, true where it is "
                "filled."
            )
        return features, mask.bool()

    def embed(self, features):
        """Project captions: (B, T, F) -> (B, T, D)."""
        return self(features.to(self[0].weight.dtype))

    def none(self, features, mask):
        """Return (features, mask) in which every caption is `no_caption`, in the shapes given.

        Raises UserError where `no_caption` is not set or has another shape. Zeros are no substitute
        for the text encoder's features of "", which the public networks use: the projection has no
        biases and maps zeros to zeros, whatever its weights are.
        """
        if self.no_caption is None:
            raise UserError(
                "guidance and dropped conditions need the features of the empty caption. Set "
                "generator.condition.no_caption = (features, mask) of the text encoder for ''."
            )
        no_features, no_mask = (tensor.to(features.device) for tensor in self.no_caption)
        if no_features.shape != features.shape[1:] or no_mask.shape != mask.shape[1:]:
            raise UserError(
                f"no_caption has the shapes {tuple(no_features.shape)}, {tuple(no_mask.shape)}, a "
                f"caption has {tuple(features.shape[1:])}: both need as many slots."
            )
        return no_features.to(features.dtype).expand_as(features), no_mask.bool().expand_as(mask)

    def drop(self, features, mask, dropped):
        """Return (features, mask), with `no_caption` where `dropped` (B,) bool is true."""
        no_features, no_mask = self.none(features, mask)
        features = torch.where(dropped[:, None, None], no_features, features)
        return features, torch.where(dropped[:, None], no_mask, mask)
