"""The detector of scenes: a small network that says which objects an image shows.

`gear.evaluation.judge` makes scores of what it says. No alignment uses it: it has another
architecture than the scenes teacher, and it is trained on other scenes (recipe `detector-scenes`).
Its own error on scenes that nothing was trained on is measured and stands beside every score.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gear.data.scenes import COLOURS, GROUNDS, OBJECT_FIELDS, SHAPES, TEXTURES
from gear.images import check_images
from gear.weights import load_packaged

PACKAGED = Path(__file__).with_name("detector.safetensors")
SIDE = 32  # of the images it reads, in pixels; others are resized
GRID = 16  # cells per side in which centres are found
WIDTHS = (64, 80, 96)  # channels at 16 x 16, 8 x 8 and 4 x 4 cells
DIM = 128  # channels that the heads read
CELL_HEADS = {  # outputs per cell
    "centre": 1,  # logit of an object's centre in this cell
    "offset": 2,  # of the centre within the cell, x and y in cells
    "front": 1,  # logit of the frontmost object
    "shape": len(SHAPES),
    "texture": len(TEXTURES),
    "colour": len(COLOURS),
}


class Block(nn.Module):
    """Two 3x3 convolutions with batch-independent normalisation, added to their input."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(1, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(1, channels),
        )

    def forward(self, x):
        return F.relu(x + self.layers(x))


class Detector(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> what each of 16 x 16 cells shows, as in CenterNet.

    An encoder to 4 x 4 cells and a decoder back, with the encoder's maps added (a U-Net); the
    ground is read from the coarsest map. `forward` returns {head: (B, channels, 16, 16)} and
    "ground" (B, 6), all logits but "offset".
    """

    def __init__(self):
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.fine = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(32, fine, 4, 2, 1),
            nn.ReLU(),
            Block(fine),
        )
        self.middle = nn.Sequential(nn.Conv2d(fine, middle, 4, 2, 1), nn.ReLU(), Block(middle))
        self.coarse = nn.Sequential(nn.Conv2d(middle, coarse, 4, 2, 1), nn.ReLU(), Block(coarse))
        self.to_middle = nn.Conv2d(coarse, middle, 1)
        self.to_fine = nn.Conv2d(middle, fine, 1)
        self.join_middle = Block(middle)
        self.join_fine = Block(fine)
        self.cells = nn.Sequential(nn.Conv2d(fine, DIM, 1), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Conv2d(DIM, n, 1) for name, n in CELL_HEADS.items()})
        self.ground = nn.Linear(coarse, len(GROUNDS))
        nn.init.constant_(self.heads["centre"].bias, -4.0)  # about two of 256 cells have a centre

    def maps(self, images):
        """Return what the heads read: a map (B, 128, 16, 16), and the coarsest (B, 96, 4, 4)."""
        if images.shape[-1] != SIDE or images.shape[-2] != SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="area")
        fine = self.fine(images)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.join_middle(middle + F.interpolate(self.to_middle(coarse), scale_factor=2))
        fine = self.join_fine(fine + F.interpolate(self.to_fine(middle), scale_factor=2))
        return self.cells(fine), coarse

    def forward(self, images, check=True):
        check_images(images, check)
        cells, coarse = self.maps(images)
        outputs = {name: head(cells) for name, head in self.heads.items()}
        return outputs | {"ground": self.ground(coarse.mean((2, 3)))}

    def features(self, images):
        """Return pooled features (B, 128) for a Fréchet distance: images (B, 3, H, W) in [-1, 1]
        -> the mean over the cells that the heads read.
        """
        return self.maps(images)[0].mean((2, 3))

    def object_losses(self, images, objects):
        """Return the loss of each head, {f"{name}_loss": scalar}: images (B, 3, H, W) in [-1, 1],
        objects (B, 3, 7) as in `Scenes.objects`.

        Centres have CenterNet's focal loss, the sum over cells divided by the number of objects;
        the other heads are read at the cells of visible objects: cross entropies, and the L1
        distance of the offset.
        """
        outputs = self(images)
        image, place = torch.nonzero(objects[..., 0] > 0, as_tuple=True)
        visible = dict(zip(OBJECT_FIELDS, objects[image, place].unbind(-1)))
        position = torch.stack([visible["x"], visible["y"]], 1) * GRID
        column, row = position.long().clamp(0, GRID - 1).unbind(1)
        at_cells = {
            name: map[image, :, row, column] for name, map in outputs.items() if name != "ground"
        }
        losses = {
            "centre_loss": focal_loss(
                outputs["centre"][:, 0], centre_heat(image, position, len(images))
            ),
            "offset_loss": F.l1_loss(at_cells["offset"], position - torch.stack([column, row], 1)),
            "front_loss": F.binary_cross_entropy_with_logits(
                at_cells["front"][:, 0], (place == 0).float()
            ),
            "ground_loss": F.cross_entropy(outputs["ground"], objects[:, 0, -1].long()),
        }
        return losses | {
            f"{name}_loss": F.cross_entropy(at_cells[name], visible[name].long())
            for name in ("shape", "texture", "colour")
        }


def centre_heat(image, position, count):
    """Return CenterNet's targets (count, 16, 16): 1 in the cell of a centre, and around it a bump
    with a standard deviation of 0.7 cells.

    image: (M,) the image of each centre. position: (M, 2), x and y in cells.
    """
    axis = torch.arange(GRID, device=position.device)
    cell = position.long().clamp(0, GRID - 1)
    distance = (axis[None, None, :] - cell[:, 0, None, None]) ** 2 + (
        axis[None, :, None] - cell[:, 1, None, None]
    ) ** 2
    bumps = torch.exp(-distance / (2 * 0.7**2))  # (M, 16, 16)
    heat = torch.zeros(count, GRID, GRID, device=position.device)
    return heat.scatter_reduce_(0, image[:, None, None].expand_as(bumps), bumps, "amax")


def focal_loss(logits, heat):
    """Compute CenterNet's focal loss (its Eq. 1, alpha 2 and beta 4) per object: logits and heat
    (B, 16, 16).
    """
    is_centre = heat == 1
    p = logits.sigmoid()
    terms = torch.where(
        is_centre,
        (1 - p) ** 2 * F.logsigmoid(logits),
        (1 - heat) ** 4 * p**2 * F.logsigmoid(-logits),
    )
    return -terms.sum() / is_centre.sum().clamp(min=1)


def degrade(images):
    """Blur and disturb images (B, 3, H, W) in [-1, 1] at random, half of them each, so that the
    detector does not depend on pixels that no tokenizer keeps.
    """
    b = len(images)
    strength = torch.rand(2, b, 1, 1, 1, device=images.device)
    strength = strength * (torch.rand(2, b, 1, 1, 1, device=images.device) < 0.5)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + strength[0] * (blurred - images)
    return (images + 0.1 * strength[1] * torch.randn_like(images)).clamp(-1, 1)


def load_detector():
    """Load the packaged detector, frozen and in evaluation mode.

    Raises UserError where its file is missing or damaged.
    """
    return load_packaged(Detector(), PACKAGED, "scenes detector", "make detector")
