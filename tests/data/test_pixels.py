"""Pixels equal those that an image viewer shows, for every mode, depth and orientation, in folders,
zips and shards.
"""

import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from gear.config import UserError
from gear.data import DataConfig, open_source
from gear.data.pixels import INTERPOLATIONS, described, square, to_rgb, why_no_image

RAMP = np.linspace(0, 65535, 16).astype(np.uint16)  # 16 columns, from black to white


def only_image(path, side=16):
    """Return the pixels of the only image of a source."""
    return open_source(DataConfig(str(path), side), "all").images([0])[0]


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def packed(folder, name, content, store):
    """Put one file into a folder, a zip or a tar, and return the path of that source."""
    folder.mkdir(exist_ok=True)
    if store == "folder":
        (folder / "a").mkdir()
        (folder / "a" / name).write_bytes(content)
        return folder
    if store == "zip":
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr(f"a/{name}", content)
        return folder / "a.zip"
    with tarfile.open(folder / "a.tar", "w") as archive:
        entry = tarfile.TarInfo(f"a/{name}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return folder / "a.tar"


def square_of(row):
    """Repeat a row of 16 values to an image of 16 x 16."""
    return np.repeat(row[None], 16, 0)


GREY = np.arange(0, 256, 17)  # 0, 17, ... 255
DEEP = {  # the same 16 greys in many formats and depths: (format, image, options)
    "16-bit PNG": ("PNG", Image.fromarray(square_of(RAMP)), {}),
    "16-bit TIFF": ("TIFF", Image.fromarray(square_of(RAMP)), {}),
    "16-bit TIFF, big end first": ("TIFF", Image.fromarray(square_of(RAMP).astype(">u2")), {}),
    "16-bit PGM": ("PPM", Image.fromarray(square_of(RAMP)), {}),
    "float TIFF": ("TIFF", Image.fromarray(square_of(GREY / 255).astype(np.float32)), {}),
    "8-bit PNG": ("PNG", Image.fromarray(square_of(GREY).astype(np.uint8)), {}),
    "palette": ("GIF", Image.fromarray(square_of(GREY).astype(np.uint8)).convert("P"), {}),
    "CMYK": (
        "TIFF",
        Image.fromarray(square_of(GREY).astype(np.uint8)).convert("RGB").convert("CMYK"),
        {},
    ),
    "grey with alpha": ("PNG", Image.fromarray(square_of(GREY).astype(np.uint8)).convert("LA"), {}),
    "YCbCr TIFF": (
        "TIFF",
        Image.fromarray(square_of(GREY).astype(np.uint8)).convert("RGB").convert("YCbCr"),
        {},
    ),
    "JPEG 2000": (
        "JPEG2000",
        Image.fromarray(square_of(GREY).astype(np.uint8)),
        {"irreversible": False},
    ),
    "WebP": (
        "WEBP",
        Image.fromarray(square_of(GREY).astype(np.uint8)).convert("RGB"),
        {"lossless": True},
    ),
    "BMP": ("BMP", Image.fromarray(square_of(GREY).astype(np.uint8)), {}),
    "TGA": ("TGA", Image.fromarray(square_of(GREY).astype(np.uint8)), {}),
    "PCX": ("PCX", Image.fromarray(square_of(GREY).astype(np.uint8)), {}),
}


@pytest.mark.parametrize("store", ("folder", "zip", "tar"))
@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_greys_are_those_greys_in_any_depth(tmp_path, kind, store):
    format, image, options = DEEP[kind]
    extension = {"PPM": "pgm", "JPEG2000": "jp2", "TIFF": "tif"}.get(format, format.lower())
    source = packed(tmp_path / "s", f"0.{extension}", encoded(image, format, **options), store)
    rounding = 1 if kind == "YCbCr TIFF" else 0
    np.testing.assert_allclose(
        only_image(source).astype(int), np.repeat(square_of(GREY)[..., None], 3, 2), atol=rounding
    )


def test_a_twelve_bit_tiff_and_one_whose_white_is_zero(tmp_path):
    values = square_of((GREY / 255 * 4095).round().astype(np.uint16))
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0  # PhotometricInterpretation: white is 0
    Image.fromarray(65535 - square_of(RAMP)).save(tmp_path / "inverted.tif", tiffinfo=info)
    with Image.open(tmp_path / "inverted.tif") as image:
        assert image.tag_v2[262] == 0 and image.mode.startswith("I;16")
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], GREY)
    image = Image.fromarray(values)
    image.tag_v2 = {258: (12,)}
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ("JPEG", "PNG", "TIFF", "WEBP"))
def test_every_orientation_is_undone(tmp_path, kind, orientation):
    """The image has a red corner at the top left and is turned as a camera would store it."""
    upright = np.full((32, 24, 3), 255, np.uint8)
    upright[:16, :12] = (255, 0, 0)
    transpositions = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # how the camera turned the image: the inverse of ImageOps' table
    turned = Image.fromarray(upright)
    if orientation > 1:
        turned = turned.transpose(Image.Transpose(transpositions[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 100, "subsampling": 0}
        if kind == "JPEG"
        else {"lossless": True}
        if kind == "WEBP"
        else {}
    )
    path = tmp_path / f"0.{kind.lower()}"
    turned.save(path, kind, exif=exif, **options)
    pixels = only_image(path, 24).astype(int)
    assert pixels.shape == (24, 24, 3)
    assert (
        abs(pixels[2, 2] - (255, 0, 0)).max() < 12
        and abs(pixels[2, 21] - 255).max() < 12
        and abs(pixels[21, 2] - 255).max() < 12
    )


@pytest.mark.parametrize("image", (
    # RGBA
    Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), square_of(255 - GREY).astype(np.uint8)])),
    Image.fromarray(np.dstack([np.zeros((16, 16), np.uint8), square_of(255 - GREY).astype(np.uint8)]), "LA"),
), ids=("RGBA", "LA"))  # fmt: skip
def test_transparent_pixels_are_laid_over_white(tmp_path, image):
    """Black of growing transparency becomes grey of growing brightness."""
    image.save(tmp_path / "0.png")
    np.testing.assert_array_equal(only_image(tmp_path / "0.png")[0, :, 0], GREY)


def test_transparent_colours_of_a_palette_and_of_a_png_are_laid_over_white(tmp_path):
    halves = np.zeros((16, 16), np.uint8)
    halves[:, 8:] = 1
    palette = Image.fromarray(halves, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.fromarray(np.repeat(halves[..., None] * 9, 3, 2)).save(
        tmp_path / "rgb.png", transparency=(9, 9, 9)
    )
    for name, colour in (("p.png", (10, 20, 30)), ("p.gif", (10, 20, 30)), ("rgb.png", (0, 0, 0))):
        pixels = only_image(tmp_path / name)
        assert tuple(pixels[0, 0]) == colour and tuple(pixels[0, 15]) == (255, 255, 255), name


@pytest.mark.parametrize("image, reason", (
    (Image.fromarray(np.full((16, 16), 7.0, np.float32)), "floats from 7 to 7"),
    (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "floats from nan to nan"),
    (Image.fromarray(np.full((16, 16), 70000, np.int32)), "32-bit integers, whose white is not known"),
))  # fmt: skip
def test_pixels_without_a_known_white_are_an_error(tmp_path, image, reason):
    image.save(tmp_path / "0.tif")
    with pytest.raises(UserError, match=f"1 of 1 images cannot be read, over 1%.*{reason}"):
        only_image(tmp_path / "0.tif")


def test_an_image_with_a_damaged_camera_note_is_read(tmp_path):
    Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(
        tmp_path / "0.png", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff"
    )
    assert (only_image(tmp_path / "0.png") == 77).all()


def test_the_first_of_several_frames_is_read(tmp_path):
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (50, 100, 150)]
    for name in ("0.gif", "0.tif", "0.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (only_image(tmp_path / name) == 50).all()
        with Image.open(tmp_path / name) as image:
            assert described(image)["frames"] == 3


# -- which files are images ------------------------------------------------------------------------


def test_an_image_is_recognised_by_its_content_under_any_name(tmp_path):
    content = encoded(Image.fromarray(np.full((16, 16, 3), 5, np.uint8)), "PNG")
    for name in ("picture", "0a1b2c3d", "x.dat", "y.picture", "Z.JFIF", "a.tiff", "b.gif"):
        assert why_no_image(name, lambda: io.BytesIO(content)) is None, name
    for name in ("notes", "x.dat"):
        assert why_no_image(name, lambda: io.BytesIO(b"no image at all")) == (
            f"{name[1:5] if '.' in name else 'no extension'}, no image",
            False,
        )
    assert why_no_image("a.HEIC", None) == (".heic, which Pillow does not open", True)
    assert why_no_image("a.txt", None) == (".txt, no image", False)
    for name in ("._a.png", "x/.b/1.png", "__MACOSX/1.png", "Thumbs.db"):
        assert why_no_image(name, None) == ("hidden by a system", False), name


# -- size and memory -------------------------------------------------------------------------------


def test_a_long_image_is_cropped_before_it_is_resized(tmp_path):
    """Its pixels equal those of the image resized whole, up to rounding, and it needs no more
    memory than other images.
    """
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (200, 9, 3), np.uint8))
    for name, resample in list(INTERPOLATIONS.items())[:2]:
        for draw in (None, np.array([0.3, 0.9])):
            width, height = 32, round(200 * 32 / 9)
            y = (height - 32) // 2 if draw is None else int(draw[1] * (height - 31))
            plain = np.asarray(image.resize((width, height), resample).crop((0, y, 32, y + 32)))
            assert abs(square(image, 32, resample, draw).astype(int) - plain).max() <= 1, name
    wide = image.transpose(Image.Transpose.TRANSPOSE)
    plain = np.asarray(wide.resize((711, 32), 3).crop((339, 0, 371, 32)))
    assert abs(square(wide, 32, Image.Resampling.BICUBIC).astype(int) - plain).max() <= 1
    Image.fromarray(rng.integers(0, 256, (12_000, 2, 3), np.uint8)).save(tmp_path / "sliver.png")
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / "plain.png")
    code = (
        "import resource, sys; from gear.data import DataConfig, load; "
        "load(DataConfig(sys.argv[1], 256), 'all'); "
    )
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True
            ).stdout
        )
        for name in ("sliver.png", "plain.png")
    ]
    assert peaks[0] < 1.1 * peaks[1]


def test_a_colour_profile_is_named(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, content in (("good.png", profile), ("bad.png", b"no profile at all")):
        Image.new("RGB", (16, 16)).save(tmp_path / name, icc_profile=content)
    with Image.open(tmp_path / "good.png") as good, Image.open(tmp_path / "bad.png") as bad:
        assert (
            "sRGB" in described(good)["profile"]
            and described(bad)["profile"] == "a profile that cannot be read"
        )


def test_a_transparent_grey_of_sixteen_bits_and_an_invalid_orientation(tmp_path):
    Image.fromarray(square_of(RAMP)).save(tmp_path / "0.png", transparency=0)
    assert only_image(tmp_path / "0.png")[0, :2, 0].tolist() == [255, 17]
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(square_of(GREY).astype(np.uint8)).save(tmp_path / "1.png", exif=exif)
    np.testing.assert_array_equal(only_image(tmp_path / "1.png")[0, :, 0], GREY)
    with Image.open(tmp_path / "1.png") as image:
        assert not described(image)["turned"]
