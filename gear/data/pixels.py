"""The rules by which files are recognised as images and become uint8 RGB squares.

The pixels are those that an image viewer shows. The orientation that a camera noted is applied; 16
bits become 8 by v / 257, floats in [0, 1] by 255 v; transparent images are laid over white; of
several frames the first is read. A colour profile is not applied, but `gear data` names it. The
rules hold for folders, zips and shards alike.
"""

import functools
import io
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageCms

RULES = "pixels 2"  # version of the rules above; a change makes results from pixels stale
GROUND = (255, 255, 255)  # colour behind transparent pixels
LONGEST = 16  # ratio of long to short side above which an image is cropped before it is resized
MARGIN = 3  # pixels around a crop that interpolation depends on
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COMMON = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SYSTEM = {  # files and folders that macOS, Windows and network storage put among images
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
# formats that Pillow recognises but cannot read without a plug-in
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
UNOPENED = {  # extensions of images for which Pillow has no decoder
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
OTHER = {  # extensions of files that are no images; such files are not opened, to save time
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
    """Return all extensions that Pillow reads; the first call loads all of its plug-ins."""
    readable = lambda kind: kind in Image.OPEN and kind not in STUBS  # noqa: E731
    return {suffix for suffix, kind in Image.registered_extensions().items() if readable(kind)}


def is_hidden(name):
    """Return whether a path is a hidden file of the system: `._1.png`, `__MACOSX/`, `Thumbs.db`."""
    path = PurePosixPath(name)
    return any(part.startswith(".") or part.lower() in SYSTEM for part in path.parts)


def suffix_of(name):
    return PurePosixPath(name).suffix.lower()


def why_no_image(name, open_file):
    """Return (reason, is_loss) if a file is left out, or None if it is an image.

    Common extensions are trusted. Files with unknown extensions are opened by `open_file()`, and
    Pillow recognises images by their content. is_loss: the file is an image, but cannot be read.
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
    except Exception:  # decoders raise errors of any type
        return False


def to_rgb(image):
    """Convert an image that Pillow opened to RGB of 8 bits, upright, with white behind transparent
    pixels.

    Raises ValueError for floats outside [0, 1] and for integers whose white is unknown.
    """
    image.load()
    # read after loading, which turns a TIFF upright already
    upright = UPRIGHT.get(_orientation(image))
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*GROUND, 255)), image)
    image = image.convert("RGB")
    return image if upright is None else image.transpose(upright)


def _orientation(image):
    """Return the orientation that a camera noted, from 1 to 8, or 1 if there is no valid note."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
        return number if number in UPRIGHT else 1
    except Exception:  # the pixels are good even if the note is damaged
        return 1


def _eight_bits(image):
    """Convert an image of more than eight bits per value to the mode L; return others unchanged."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1  # a TIFF may have twelve
        values = np.asarray(image)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0 there
            values = white - values
        grey = Image.fromarray(_scaled(values, white))
        # one value of grey may mean "transparent"
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
        low = values.min()
        high = values.max()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"floats from {low:g} to {high:g}: only those in [0, 1] have a colour")
        return Image.fromarray(_scaled(values, 1))
    return image


def _scaled(values, white):
    return np.floor(values.astype(np.float64) * (255 / white) + 0.5).astype(np.uint8)


def square(image, side, resample, draw=None):
    """Resize an RGB image's short side to `side` pixels and crop a square: (side, side, 3) uint8.

    draw: two numbers in [0, 1), the position of the crop; by default the centre.
    """
    width, height = resized = resized_to(image.size, side)
    slack = np.array(resized) - side
    x, y = slack // 2 if draw is None else (draw * (slack + 1)).astype(int)
    if max(resized) > LONGEST * side:  # resizing all of a long image could exhaust the memory
        return _square_of_long_image(image, side, resample, x / width, y / height, resized)
    image = image.resize(resized, resample)
    return np.asarray(image.crop((x, y, x + side, y + side)))


def _square_of_long_image(image, side, resample, x, y, resized):
    """Return the square at (x, y), given as shares of the image, without resizing all of it.

    Only the pixels that the square depends on are resized, horizontally and then vertically as
    Pillow does.
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
    """Return the width and height of an image of `size` with its short side resized to `side`."""
    scale = side / min(size)
    return [max(side, round(length * scale)) for length in size]


def described(image):
    """Return the properties in the header of an image that Pillow opened, as a dict.

    format, mode: text. turned: whether the camera noted a rotation. profile: the name of the colour
    profile, or "". frames: their number.
    """
    return {
        "format": image.format or "",
        "mode": image.mode,
        "turned": _orientation(image) > 1,
        "profile": _profile(image.info.get("icc_profile")),
        "frames": getattr(image, "n_frames", 1),
    }


def _profile(content):
    """Return the name of a colour profile, or "" if there is none."""
    try:
        return content and ImageCms.getProfileDescription(io.BytesIO(content)).strip() or ""
    except ImageCms.PyCMSError:
        return "a profile that cannot be read"
