"""Frozen vision encoders. One face: `teacher(images)` -> patch features (B, L, dim) on a grid of `teacher.grid(size)`."""

from gear.config import UserError, nearest
from gear.teachers import efficientnet, scenes

TEACHERS = {  # name: (load the network, load the teacher for the images of a DataConfig and a stride)
    "scenes": (scenes.load_scenes_teacher, lambda data, stride: scenes.load_scenes_teacher()),
    efficientnet.NAME: (efficientnet.load_network, efficientnet.load_efficientnet_teacher),
}


def load_teacher(name, data, stride):
    """Load a teacher by name for the images of a DataConfig and patches `stride` pixels wide: frozen, in eval mode.

    The scenes teacher is one for its own images and stride, whatever is asked for. Raises UserError for an unknown name and
    for weights that are not on this machine.
    """
    return _known(name)[1](data, stride)


def check_installed(name):
    """Raise UserError unless the teacher `name` exists and its weights are on this machine."""
    _known(name)[0]()


def _known(name):
    if name not in TEACHERS:
        raise UserError(f"unknown teacher '{name}'. Known: {', '.join(TEACHERS)}.{nearest(name, TEACHERS)}")
    return TEACHERS[name]


def check_grid(teacher, image_size, downsampling):
    """Raise UserError unless the teacher's grid equals the token grid, image_size / downsampling on a side."""
    patches, tokens = teacher.grid(image_size), image_size // downsampling
    if patches != tokens:
        raise UserError(
            f"the teacher sees {image_size} px as {patches} x {patches} patches, the tokenizer as {tokens} x {tokens} tokens: "
            f"alignment pairs them one to one. Choose a teacher of stride {downsampling}, or a tokenizer that halves "
            f"{teacher.stride.bit_length() - 1} times (--channel-mult)."
        )
