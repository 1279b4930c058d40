"""Frozen vision encoders. One face: `teacher(images)` -> patch features (B, L, dim) on a grid of `teacher.grid(size)`."""

from gear.config import UserError, nearest
from gear.teachers.scenes import load_scenes_teacher

TEACHERS = {"scenes": load_scenes_teacher}


def load_teacher(name):
    """Load a teacher by name, frozen, in eval mode; raises UserError for an unknown name."""
    if name not in TEACHERS:
        raise UserError(f"unknown teacher '{name}'. Known: {', '.join(TEACHERS)}.{nearest(name, TEACHERS)}")
    return TEACHERS[name]()


def check_grid(teacher, image_size, downsampling):
    """Raise UserError unless the teacher's grid equals the token grid, image_size / downsampling on a side."""
    patches, tokens = teacher.grid(image_size), image_size // downsampling
    if patches != tokens:
        raise UserError(
            f"the teacher sees {image_size} px as {patches} x {patches} patches, the tokenizer as {tokens} x {tokens} tokens: "
            f"alignment pairs them one to one. Choose a teacher of stride {downsampling}, or a tokenizer that halves "
            f"{teacher.stride.bit_length() - 1} times (--channel-mult)."
        )
