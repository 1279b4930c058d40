"""Configuration of a generator: its sizes, tap layer and condition; the public sizes by name."""

from dataclasses import dataclass
from typing import Literal

from gear.config import BelowOne, Checked, Count, NonNegative, Share, Whole, require


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """Configuration of a Generator.

    The defaults are LlamaGen-L; `GENERATORS` has the other public sizes.
    """

    width: Count = 1024  # width of the residual stream, D
    layers: Count = 24  # number of transformer blocks
    heads: Count = 16  # number of attention heads per block
    num_classes: Count = 1000  # number of classes; a run takes it from its images
    # number of blocks before the aligned residual stream: 0 aligns the input of the first block;
    # by default a third of the depth
    tap_layer: Whole = 8
    projector_dim: Count = 2048  # hidden width of the projector
    class_dropout: Share = 0.1  # share of conditions that are dropped in training, for guidance
    dropout: BelowOne = 0.1  # dropout of embeddings, attention outputs and feed-forward outputs
    # standard deviation at which the token embedding starts; the soft read-out averages its rows
    embed_std: NonNegative = 0.02
    # rotation of the condition's queries and keys: identity leaves them unchanged; zero, as in the
    # public checkpoints, sets them to zero
    condition_rotation: Literal["identity", "zero"] = "identity"
    text_slots: Whole = 0  # largest number of tokens in a caption; 0 conditions on a class instead
    text_dim: Count = 2048  # width of a caption's features
    # number of first layers in which text and image have separate projections (Appendix B)
    dual_layers: Whole = 0

    def __post_init__(self):
        super().__post_init__()
        require(
            self.width % (4 * self.heads) == 0,
            f"width {self.width} over {self.heads} heads: 2-D RoPE needs a head width divisible by "
            "4.",
        )
        for name in ("tap_layer", "dual_layers"):
            layer = getattr(self, name)
            require(
                layer <= self.layers,
                f"{name} is {layer}: it has to be at most {self.layers}, the number of layers.",
            )
        require(
            self.text_slots or not self.dual_layers,
            f"dual_layers is {self.dual_layers}: without text_slots it has to be 0.",
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
