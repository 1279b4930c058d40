"""Pixels as a viewer shows them: which files are images, and how any of them becomes a uint8 RGB
square.

The rules, for folders, zips and shards alike: the orientation that a camera noted is applied; 16
bits become 8 by v / 257; floats in [0, 1] by 255 v; what is transparent lies over white; of several
frames the first is read. A colour profile is not applied: `gear data` names it.
"""

import functools
import io
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageCms

RULES = "pixels 2"  # a change of the rules above makes what was computed from pixels stale
GROUND = (255, 255, 255)  # what lies behind transparent pixels
LONGEST = 16  # sides: of an image longer than that, the part that is kept is cut out first
MARGIN = 3  # pixels around it that an enlarged part depends on
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
UPRIGHT = {  # what undoes an orientation, by its number in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COMMON = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SYSTEM = {  # what Macs, Windows and storage boxes put among images
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
# Pillow knows their names and cannot read them here
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
UNOPENED = {  # images, and Pillow has no decoder for them
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".svgz",
    ".exr",
    ".hdr",
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".orf",
    ".rw2",
    ".raf",
    ".xcf",
    ".psb",
    ".ai",
    ".wmf",
    ".emf",
    ".dcm",
}
OTHER = {  # no images: taken for what they are called, without a look at millions of captions
    ".txt",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".xml",
    ".yaml",
    ".yml",
    ".md",
    ".html",
    ".htm",
    ".cls",
    ".npy",
    ".npz",
    ".pt",
    ".pth",
    ".ckpt",
    ".safetensors",
    ".parquet",
    ".mat",
    ".pkl",
    ".db",
    ".sqlite",
    ".ini",
    ".py",
    ".ipynb",
    ".sh",
    ".log",
    ".lock",
    ".tmp",
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    ".bz2",
    ".xz",
    ".zst",
    ".7z",
    ".rar",
    ".pdf",
    ".doc",
    ".docx",
    ".mp4",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wav",
    ".mp3",
    ".flac",
    ".h5",
    ".hdf",
    ".hdf5",
    ".grib",
    ".bufr",
}


@functools.cache
def _openable():
    """The extensions that Pillow reads beside the common ones; asking loads all of its plug-ins."""
    readable = lambda kind: kind in Image.OPEN and kind not in STUBS  # noqa: E731
    return {suffix for suffix, kind in Image.registered_extensions().items() if readable(kind)}


def is_hidden(name):
    """Tell what a system hides among images: `._1.png`, `.DS_Store`, `__MACOSX/`, `Thumbs.db`."""
    path = PurePosixPath(name)
    return any(part.startswith(".") or part.lower() in SYSTEM for part in path.parts)


def suffix_of(name):
    return PurePosixPath(name).suffix.lower()


def why_no_image(name, open_file):
    """Return (reason, is_loss) for which a file is left out, or None for an image.

    A usual extension is believed; any other file is opened, by `open_file()`, and Pillow tells by
    its content. A loss is an image that cannot be had, as against a file that is none.
    """
    suffix = suffix_of(name)
    if is_hidden(name):
        return "hidden by a system", False
    if suffix in COMMON:
        return None
    if suffix in UNOPENED:
        return f"{suffix}, which Pillow does not open", True
    if suffix not in OTHER and (suffix in _openable() or _is_image(open_file)):
        return None
    return f"{suffix or 'no extension'}, no image", False


def _is_image(open_file):
    try:
        with open_file() as file, Image.open(file) as image:
            return image.format not in STUBS
    except Exception:  # a decoder raises whatever it likes at what is none of its own
        return False


def to_rgb(image):
    """Return an image that Pillow opened as RGB, 8 bits, upright, over white where it is
    transparent.

    Raises ValueError for floats outside [0, 1] and for integers whose white is not known.
    """
    image.load()
    # asked once it is loaded: Pillow turns a TIFF itself
    upright = UPRIGHT.get(_orientation(image))
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*GROUND, 255)), image)
    image = image.convert("RGB")
    return image if upright is None else image.transpose(upright)


def _orientation(image):
    """Return the orientation that a camera noted, 1 to 8; 1 where the note cannot be read."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return number if number in UPRIGHT else 1
    except Exception:  # a damaged note is no reason to lose the pixels
        return 1


def _eight_bits(image):
    """Bring a channel of more than eight bits to L."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1  # a TIFF may have twelve
        values = np.asarray(image)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0 there
            values = white - values
        grey = Image.fromarray(_scaled(values, white))
        # a grey that stands for nothing
        if isinstance(clear := image.info.get("transparency"), int):
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "I":
        values = np.asarray(image)
        if image.format not in ("PNG", "PPM") or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers, whose white is not known: save 8 or 16 bits")
        return Image.fromarray(_scaled(values, 65535))
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"floats from {low:g} to {high:g}: only those in [0, 1] have a colour")
        return Image.fromarray(_scaled(values, 1))
    return image


def _scaled(values, white):
    return np.floor(values.astype(np.float64) * (255 / white) + 0.5).astype(np.uint8)


def square(image, side, resample, draw=None):
    """Resize an RGB image's short side to `side` pixels and crop: (side, side, 3) uint8.

    The crop is at the centre, or where `draw`, two numbers in [0, 1), says.
    """
    width, height = resized = resized_to(image.size, side)
    room = np.array(resized) - side
    x, y = room // 2 if draw is None else (draw * (room + 1)).astype(int)
    if max(resized) > LONGEST * side:  # enlarged whole, a sliver would fill the memory
        return _square_of_sliver(image, side, resample, x / width, y / height, resized)
    image = image.resize(resized, resample)
    return np.asarray(image.crop((x, y, x + side, y + side)))


def _square_of_sliver(image, side, resample, x, y, resized):
    """Cut out what the square at (x, y), shares of the image, is made of; resize that, as Pillow
    would: across, then down.
    """
    begins = [x * image.width, y * image.height]
    ends = [begin + side * length / new for begin, length, new in zip(begins, image.size, resized)]
    left, top = (max(0, int(begin) - MARGIN) for begin in begins)
    right, bottom = (min(length, int(end) + 1 + MARGIN) for length, end in zip(image.size, ends))
    part = image.crop((left, top, right, bottom))
    part = part.resize(
        (side, part.height), resample, box=(begins[0] - left, 0, ends[0] - left, part.height)
    )
    return np.asarray(
        part.resize((side, side), resample, box=(0, begins[1] - top, side, ends[1] - top))
    )


def resized_to(size, side):
    """Return the width and height to which an image of `size` is resized: its short side is
    `side`.
    """
    scale = side / min(size)
    return [max(side, round(length * scale)) for length in size]


def described(image):
    """Say what an image that Pillow opened is, by its header: format, mode, and oddities.

    {"format", "mode": text, "turned": bool, "profile": its name or "", "frames": their number}.
    """
    return {
        "format": image.format or "",
        "mode": image.mode,
        "turned": _orientation(image) > 1,
        "profile": _profile(image.info.get("icc_profile")),
        "frames": getattr(image, "n_frames", 1),
    }


def _profile(content):
    """Return the name of a colour profile, "" for none."""
    try:
        return content and ImageCms.getProfileDescription(io.BytesIO(content)).strip() or ""
    except ImageCms.PyCMSError:
        return "a profile that cannot be read"
