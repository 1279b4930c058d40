"""Teachers: frozen vision models with one interface.

`teacher(images)` returns patch features (B, L, dim) on a square grid whose side is
`teacher.grid(image_size)`. It first checks the images with `check_images`; a training step passes
`check=False` to skip the check of values, which would wait for the device.
"""

import torch
from torch import nn

from gear.config import UserError, nearest
from gear.teachers import efficientnet, scenes, vit

# name: (function that loads the network, function of a DataConfig and a stride that loads the
# teacher)
PACKAGED = {
    "scenes": (scenes.load_scenes_teacher, lambda data, stride: scenes.load_scenes_teacher()),
    efficientnet.NAME: (efficientnet.load_network, efficientnet.load_efficientnet_teacher),
}
TEACHERS = (*PACKAGED, *vit.VITS)


def load_teacher(name, data, stride, offline=False):
    """Load a teacher for the images of a DataConfig and patches of `stride` pixels, frozen and in
    evaluation mode.

    `name` is one of TEACHERS; that of a public vision transformer may add a layer and a weight
    file, NAME[@LAYER][=PATH]. The scenes teacher always has its own stride of 4. With `offline` or
    $HF_HUB_OFFLINE nothing is downloaded. Raises UserError for an unknown name, a grid that cannot
    match, and weights that are missing or do not fit.
    """
    if bare_name(name) in PACKAGED:
        return PACKAGED[name][1](data, stride)
    return vit.load_vit_teacher(name, data, stride, offline)


def load_teachers(names, data, stride, offline=False):
    """Load several teachers, with `names` separated by commas, as a list; see `load_teacher`."""
    return [load_teacher(name, data, stride, offline) for name in split(names)]


class SideBySide(nn.Module):
    """Several teachers as one: images (B, 3, H, W) -> concatenated features (B, L, sum of dims)."""

    def __init__(self, teachers):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images, check=True):
        return torch.cat([teacher(images, check) for teacher in self.teachers], -1)


def side_by_side(teachers):
    """Return a list of teachers as one teacher; a single one is returned unchanged."""
    return teachers[0] if len(teachers) == 1 else SideBySide(teachers)


def check_installed(names, data=None, stride=None, offline=False):
    """Raise UserError unless the teachers `names` exist, and their weights fit and are on this
    machine or can be downloaded.

    With a DataConfig and a stride, the grids have to match, too.
    """
    for name in split(names):
        if bare_name(name) in PACKAGED:
            PACKAGED[name][0]()
        else:
            vit.check(name, data, stride, offline)


def split(names):
    """Split names that are separated by commas into a list."""
    return [name.strip() for name in names.split(",")]


def bare_name(name):
    """Return a teacher's name without layer and path.

    Raises UserError for an unknown name, for several names, and for a layer or a path of a packaged
    teacher.
    """
    bare = vit.parse(name)[0]
    if "," in name:
        raise UserError(f"'{name}' names several teachers where one is expected.")
    if bare in PACKAGED and bare != name:
        raise UserError(
            f"the teacher {bare} comes with its weights and has one layer: write {bare}, not "
            f"{name}."
        )
    if bare not in TEACHERS:
        raise UserError(
            f"unknown teacher '{bare}'. Known: {', '.join(TEACHERS)}.{nearest(bare, TEACHERS)}"
        )
    return bare


def check_grid(teacher, image_size, downsampling):
    """Raise UserError unless the teacher's grid equals the token grid, whose side is image_size /
    downsampling.
    """
    patches = teacher.grid(image_size)
    tokens = image_size // downsampling
    if patches != tokens:
        raise UserError(
            f"the teacher divides {image_size} px into {patches} x {patches} patches, the "
            f"tokenizer into {tokens} x {tokens} tokens: alignment pairs them one to one. Choose a "
            f"teacher of stride {downsampling}, or a tokenizer that halves the resolution "
            f"{teacher.stride.bit_length() - 1} times (--channel-mult)."
        )
