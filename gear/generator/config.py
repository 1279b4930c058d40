"""What a generator is: its sizes, its tap, its condition; the public sizes by name."""

from dataclasses import dataclass
from typing import Literal

from gear.config import BelowOne, Checked, Count, NonNegative, Share, Whole, require


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """The defaults are LlamaGen-L; see `GENERATORS` for the other public sizes."""

    width: Count = 1024  # D
    layers: Count = 24
    heads: Count = 16
    num_classes: Count = 1000  # in a run those of its images
    # the residual stream after this block is aligned, 0: what enters the first; a third of the
    # depth
    tap_layer: Whole = 8
    projector_dim: Count = 2048  # hidden width of the projector
    class_dropout: Share = 0.1  # share of conditions replaced by "none", for guidance
    dropout: BelowOne = 0.1  # of embeddings, attention output and feed-forward output
    # initial spread of the token embedding; the soft read-out averages it
    embed_std: NonNegative = 0.02
    # "zero" for the public checkpoints
    condition_rotation: Literal["identity", "zero"] = "identity"
    text_slots: Whole = 0  # largest number of a caption's tokens; 0: conditioned on a class
    text_dim: Count = 2048  # width of a caption's features
    # the first layers, in which text and image have projections of their own (Appendix B)
    dual_layers: Whole = 0

    def __post_init__(self):
        super().__post_init__()
        head = (
            f"width {self.width} over {self.heads} heads: 2-D RoPE needs a head width divisible by "
            "4."
        )
        require(self.width % (4 * self.heads) == 0, head)
        for name in ("tap_layer", "dual_layers"):
            layer = getattr(self, name)
            require(
                layer <= self.layers,
                f"{name} is {layer}: it has to be at most {self.layers}, the number of layers.",
            )
        require(
            self.text_slots or not self.dual_layers,
            f"dual_layers is {self.dual_layers}: without text_slots none is.",
        )


GENERATORS = {
    "S": GeneratorConfig(384, 12, 12, tap_layer=4),
    "B": GeneratorConfig(768, 12, 12, tap_layer=4),
    "L": GeneratorConfig(1024, 24, 16, tap_layer=8),
    "XL": GeneratorConfig(1280, 36, 20, tap_layer=12),
    "XXL": GeneratorConfig(1536, 48, 24, tap_layer=16),
    "XXXL": GeneratorConfig(2560, 48, 40, tap_layer=16),
    "T2I-1B": GeneratorConfig(1440, 36, 20, tap_layer=12, text_slots=300, dual_layers=12),
}  # fmt: skip
