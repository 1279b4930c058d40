"""Frozen vision encoders. One face: `teacher(images)` -> patch features (B, L, dim) on a grid of
`teacher.grid(size)`.

Images are looked at first, see `check_images`; a step of training leaves out the `check` of values.
"""

import torch
from torch import nn

from gear.config import UserError, nearest
from gear.teachers import efficientnet, scenes, vit

# name: (load the network, load the teacher for the images of a DataConfig and a stride)
PACKAGED = {
    "scenes": (scenes.load_scenes_teacher, lambda data, stride: scenes.load_scenes_teacher()),
    efficientnet.NAME: (efficientnet.load_network, efficientnet.load_efficientnet_teacher),
}
TEACHERS = (*PACKAGED, *vit.VITS)


def load_teacher(name, data, stride, offline=False):
    """Load a teacher for the images of a DataConfig and patches `stride` pixels wide: frozen, in
    eval mode.

    `name` is one of TEACHERS; a public vision transformer takes a layer and a weight file,
    NAME[@LAYER][=PATH]. The scenes teacher is one for its own images and stride, whatever is asked
    for. With `offline` or $HF_HUB_OFFLINE nothing is fetched. Raises UserError for an unknown name,
    a grid that cannot match, and weights that are missing or do not fit.
    """
    if bare_name(name) in PACKAGED:
        return PACKAGED[name][1](data, stride)
    return vit.load_vit_teacher(name, data, stride, offline)


def load_teachers(names, data, stride, offline=False):
    """Load several teachers, named with commas between: a list, in that order. See
    `load_teacher`.
    """
    return [load_teacher(name, data, stride, offline) for name in split(names)]


class SideBySide(nn.Module):
    """Several teachers as one: images (B, 3, H, W) -> their features side by side, (B, L, sum of
    dims).
    """

    def __init__(self, teachers):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images, check=True):
        return torch.cat([teacher(images, check) for teacher in self.teachers], -1)


def side_by_side(teachers):
    """Return one teacher as it is, several as one."""
    return teachers[0] if len(teachers) == 1 else SideBySide(teachers)


def check_installed(names, data=None, stride=None, offline=False):
    """Raise UserError unless the teachers `names` exist and their weights are on this machine, or
    could be fetched, and fit.

    With a DataConfig and a stride, also unless the grids can match.
    """
    for name in split(names):
        if bare_name(name) in PACKAGED:
            PACKAGED[name][0]()
        else:
            vit.check(name, data, stride, offline)


def split(names):
    """Part "a,b" into its names."""
    return [name.strip() for name in names.split(",")]


def bare_name(name):
    """Return the name without layer and path; raises UserError for an unknown one, or one that
    takes neither.
    """
    bare = vit.parse(name)[0]
    if "," in name:
        raise UserError(f"'{name}' names several teachers where one is expected.")
    if bare in PACKAGED and bare != name:
        raise UserError(
            f"the teacher {bare} comes with its weights and has one layer: say {bare}, not {name}."
        )
    if bare not in TEACHERS:
        raise UserError(
            f"unknown teacher '{bare}'. Known: {', '.join(TEACHERS)}.{nearest(bare, TEACHERS)}"
        )
    return bare


def check_grid(teacher, image_size, downsampling):
    """Raise UserError unless the teacher's grid equals the token grid, image_size / downsampling on
    a side.
    """
    patches, tokens = teacher.grid(image_size), image_size // downsampling
    if patches != tokens:
        raise UserError(
            f"the teacher sees {image_size} px as {patches} x {patches} patches, the tokenizer as "
            f"{tokens} x {tokens} tokens: "
            f"alignment pairs them one to one. Choose a teacher of stride {downsampling}, or a "
            "tokenizer that halves "
            f"{teacher.stride.bit_length() - 1} times (--channel-mult)."
        )
