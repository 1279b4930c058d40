"""The images of folders and zips are found and named correctly, and left-out files are counted."""

import io
import os
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image

from gear.config import UserError
from gear.data import DataConfig, data_report, open_source
from gear.data.folders import in_order


def png(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def grow(root, names):
    """Save one image per name, grey by its position in the list, and return the root."""
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(i % 256))
    return root


def opened(path, split="all", **fields):
    return open_source(DataConfig(str(path), 16, **fields), split)


def by_class(source):
    """Return {class name: number of images}."""
    return dict(
        zip(
            source.classes,
            np.bincount(
                source.labels(np.arange(len(source))), minlength=len(source.classes)
            ).tolist(),
        )
    )


NAMES = [f"{c}/{i}.png" for c in "abc" for i in range(20)]


def zipped(path, root, names, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(root / name, f"{prefix}{name}")
    return path


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", (["c"], ["a", "b", "c"]))
def test_links_to_class_folders_are_followed(tmp_path, linked):
    grow(tmp_path / "far", NAMES)
    (tmp_path / "near").mkdir()
    for name in "abc":
        folder = tmp_path / "far" / name
        if name in linked:
            (tmp_path / "near" / name).symlink_to(folder)
        else:
            folder.rename(tmp_path / "near" / name)
    assert by_class(opened(tmp_path / "near")) == {"a": 20, "b": 20, "c": 20}


def test_links_to_images_are_images_and_two_links_to_a_folder_are_two_classes(tmp_path):
    grow(tmp_path / "far", NAMES[:20])
    near = grow(tmp_path / "near", ["c/x.png"])
    (near / "a").symlink_to(tmp_path / "far" / "a")
    (near / "b").symlink_to(tmp_path / "far" / "a")
    (near / "c" / "y.png").symlink_to(tmp_path / "far" / "a" / "3.png")
    assert by_class(opened(near)) == {"a": 20, "b": 20, "c": 2}


def test_a_cycle_of_links_ends(tmp_path, capsys):
    root = grow(tmp_path / "r", NAMES)
    (root / "a" / "up").symlink_to(root)
    assert by_class(opened(root)) == {"a": 20, "b": 20, "c": 20}
    assert "1 (a link to a folder it lies in), as a/up/" in capsys.readouterr().err


def test_links_to_nothing_are_counted_and_too_many_are_an_error(tmp_path, capsys):
    root = grow(tmp_path / "r", [f"a/{i}.png" for i in range(100)])
    (root / "a" / "x.png").symlink_to(tmp_path / "nowhere")
    assert len(opened(root)) == 100
    assert (
        f"{root}: 100 images; left out: 1 (a link to nothing), as a/x.png"
        in capsys.readouterr().err
    )
    (root / "a" / "y.png").symlink_to(root / "a" / "y.png")  # a link to itself
    with pytest.raises(
        UserError,
        match="2 of 102 images in .* cannot be taken, over 1%: 1 .a link to nothing.: a/x.png",
    ):
        opened(root)


def test_links_within_a_zip_are_followed(tmp_path):
    def link(archive, name, target):
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, target)

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(100):
            archive.writestr(f"a/{i}.png", png(i))
        link(archive, "b/x.png", "../a/7.png")
    source = opened(tmp_path / "a.zip")
    assert by_class(source) == {"a": 100, "b": 1}
    assert source.images([source.names.index("b/x.png")])[0, 0, 0, 0] == 7
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        link(archive, "b/y.png", "../a/no.png")
        link(archive, "b/z.png", "z.png")
    with pytest.raises(
        UserError, match="2 of 103 images .*a link to nothing, or no plain file.: b/y.png, b/z.png"
    ):
        opened(tmp_path / "a.zip")


# -- unusual formats -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extension",
    ("tif", "tiff", "gif", "jfif", "jpe", "jp2", "tga", "ppm", "ico", "avif", "dds", ""),
)
def test_a_class_of_images_in_an_unusual_format_is_read(tmp_path, extension):
    root = grow(tmp_path / "m", NAMES[:40])
    kind = {"tga": "TGA", "jfif": "JPEG", "jpe": "JPEG", "": "PNG"}.get(extension)
    for i in range(20):
        path = root / "c" / (f"{i}.{extension}" if extension else f"{i}")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(path, kind)
    assert by_class(opened(root)) == {"a": 20, "b": 20, "c": 20}
    zipped(
        tmp_path / "m.zip",
        root,
        [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()],
    )
    assert by_class(opened(tmp_path / "m.zip")) == {"a": 20, "b": 20, "c": 20}
    single = next((root / "c").iterdir())
    assert len(opened(single)) == 1


def test_a_class_that_pillow_does_not_open_is_an_error_and_captions_are_named(tmp_path, capsys):
    root = grow(tmp_path / "m", NAMES[:40])
    for i in range(20):
        (root / "a" / f"{i}.txt").write_text("a cat")
    (root / "b" / ".DS_Store").write_bytes(b"x")
    assert by_class(opened(root)) == {"a": 20, "b": 20}
    output = capsys.readouterr().err
    assert (
        "20 (.txt, no image), as a/0.txt" in output
        and "1 (hidden by a system), as b/.DS_Store" in output
    )
    assert opened(root, "train") and not capsys.readouterr().err  # reported once
    for i in range(20):
        (root / "c").mkdir(exist_ok=True)
        (root / "c" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match="the class 'c' of .* is lost: c/0.heic is .heic, which Pillow does not open",
    ):
        opened(root)
    for i in range(20):
        (root / "c" / f"{i}.heic").rename(root / "a" / f"{i}.heic")
    (root / "c").rmdir()
    with pytest.raises(
        UserError,
        match="20 of 60 images .*over 1%: 20 ..heic, which Pillow does not open.: a/0.heic",
    ) as error:
        opened(root)
    assert "Save them as PNG or JPEG" in str(error.value)


# -- names -----------------------------------------------------------------------------------------


def test_names_in_any_bytes_have_classes_and_splits(tmp_path):
    names = [b"caf\xe9/%d.png" % i for i in range(40)] + [
        "caf\u00e9/x.png".encode(),
        "\u732b/y.png".encode(),
    ]
    root = grow(tmp_path / "l", names)
    assert sorted(by_class(opened(root)).values()) == [1, 1, 40]
    train = opened(root, "train")
    val = opened(root, "val")
    assert len(train) + len(val) == 42 and not set(train.names) & set(val.names)
    assert len(train.identity()) == 64 and train.images([0]).shape == (1, 16, 16, 3)


def test_a_zip_of_any_packer_has_the_same_names_and_splits_as_its_folder(tmp_path):
    root = grow(tmp_path / "r", NAMES)
    plain = opened(root, "train")
    backslashes = tmp_path / "backslashes.zip"
    with zipfile.ZipFile(backslashes, "w") as archive:
        for name in NAMES:
            entry = zipfile.ZipInfo("x")
            entry.filename = name.replace("/", "\\")
            archive.writestr(entry, (root / name).read_bytes())
    prefixes = ("", "./", "r/", "data/r/", "/abs/")
    for archive in [
        backslashes,
        *(zipped(tmp_path / f"{i}.zip", root, NAMES, p) for i, p in enumerate(prefixes)),
    ]:
        source = opened(archive, "train")
        assert (source.names, source.classes) == (plain.names, plain.classes), archive
        np.testing.assert_array_equal(source.images([0, 5]), plain.images([0, 5]))


def test_decomposed_letters_are_composed(tmp_path):
    """A Mac stores "e" and its accent as two characters; other systems store one."""
    names = [f"caf\u00e9/{i}.png" for i in range(20)] + [f"b/{i}.png" for i in range(20)]
    root = grow(tmp_path / "r", names)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for name in names:
            archive.write(root / name, name.replace("\u00e9", "e\u0301"))
    assert opened(tmp_path / "mac.zip", "train").names == opened(root, "train").names


def test_zip_names_without_the_flag_for_utf8_keep_their_bytes(tmp_path):
    for encoding in ("utf-8", "latin-1", "cp932"):
        name = {"cp932": "\u732b"}.get(encoding, "caf\u00e9").encode(encoding)
        root = grow(tmp_path / encoding, [name + b"/%d.png" % i for i in range(20)] + NAMES[:20])
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
            for i in range(20):
                archive.writestr(f"{'N' * len(name)}/{i}.png", png(i))
                archive.writestr(NAMES[i], png(20 + i))
        (tmp_path / "z.zip").write_bytes(
            (tmp_path / "z.zip").read_bytes().replace(b"N" * len(name), name)
        )
        assert opened(tmp_path / "z.zip", "train").names == opened(root, "train").names, encoding


def test_the_later_of_two_copies_in_a_zip_counts(tmp_path, capsys):
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        archive.writestr("a/0.png", png(9))
        archive.writestr("a/0.png", png(200))
        archive.writestr("a/1.png", png(3))
    source = opened(tmp_path / "a.zip")
    assert sorted(source.images([0, 1])[:, 0, 0, 0]) == [3, 200]
    assert (
        "1 (an earlier copy of a file that stands there twice), as a/0.png"
        in capsys.readouterr().err
    )


# -- splits and classes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders",
    (
        ("train", "val"),
        ("train", "test"),
        ("Train", "Valid", "annotations"),
        ("training", "testing"),
    ),
)
@pytest.mark.parametrize("flat", (False, True))
@pytest.mark.parametrize("pack", (False, True))
def test_a_root_of_splits_is_recognised(tmp_path, folders, flat, pack):
    names = [f"{f}/{n.replace('/', '_') if flat else n}" for f in folders for n in NAMES]
    root = grow(tmp_path / "inet", names)
    path = zipped(tmp_path / "inet.zip", root, names) if pack else root
    with pytest.raises(
        UserError,
        match="'.*inet.*' holds the splits .* no classes: give one of them, as in '.*inet.*/.rain",
    ):
        opened(path)


def test_a_folder_around_all_class_folders_is_not_part_of_names(tmp_path):
    root = grow(tmp_path / "top", [f"train/{n}" for n in NAMES])
    assert by_class(opened(root)) == {"a": 20, "b": 20, "c": 20}
    assert opened(root, "train").names == opened(root / "train", "train").names
    assert by_class(opened(grow(tmp_path / "one", NAMES[:20]))) == {
        "a": 20
    }  # a single class folder is a class


def test_folders_with_numbers_are_in_numerical_order(tmp_path):
    root = grow(tmp_path / "n", [f"{c}/{i}.png" for c in range(12) for i in range(3)])
    source = opened(root)
    assert source.classes == [str(c) for c in range(12)]
    assert all(
        source.classes[label] == name.split("/")[0]
        for name, label in zip(source.names, source.labels(np.arange(36)))
    )
    assert in_order({"10_x", "9_y", "9_a"}) == ["9_a", "9_y", "10_x"]
    assert in_order({"10", "9", "b"}) == ["10", "9", "b"]
    assert in_order({"007", "10", "9"}) == ["007", "9", "10"]


LABELS = {  # kind of a file of labels: (its text, the class names)
    "one folder per line": ("c\nb\na\n", ["c", "b", "a"]),
    "Windows": ("\ufeffc\r\nb\r\na\r\n", ["c", "b", "a"]),
    "numbers": ("a,2\nb,0\nc,1\n", ["b", "c", "a"]),
    "tabs and gaps": ("a\t4\nb\t0\nc\t1", ["b", "c", "00002", "00003", "a"]),
    "more classes than folders": ("c\nx\nb\na", ["c", "x", "b", "a"]),
    "descriptions": ("b tench, Tinca tinca\na goldfish\nc great white shark", ["b", "a", "c"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_file_of_labels_numbers_the_classes(tmp_path, kind):
    root = grow(tmp_path / "n", NAMES)
    text, classes = LABELS[kind]
    (tmp_path / "labels.txt").write_bytes(text.encode())
    source = opened(root, labels=str(tmp_path / "labels.txt"))
    assert source.classes == classes
    assert all(
        classes[label] == name.split("/")[0]
        for name, label in zip(source.names, source.labels(np.arange(60)))
    )
    assert source.labels(np.arange(60)).dtype == np.int64


@pytest.mark.parametrize("text, message", (
    ("a\nb\n", r"no line for 1 of 3 class folders \(c\)"),
    ("a,0\nb,0\nc,1", "3 lines, 3 folders, 2 numbers"),
    ("a\nb\nc\nb", "4 lines, 3 folders, 4 numbers"),
    ("", "0 lines, 0 folders, 0 numbers"),
    ("a,-1\nb,0\nc,1", "no line for"),
))  # fmt: skip
def test_a_file_of_labels_that_does_not_fit_is_an_error(tmp_path, text, message):
    root = grow(tmp_path / "n", NAMES)
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(root, labels=str(tmp_path / "labels.txt"))
    with pytest.raises(UserError, match="nowhere.txt"):
        opened(root, labels=str(tmp_path / "nowhere.txt"))


def test_an_unknown_split_is_an_error(tmp_path):
    root = grow(tmp_path / "n", NAMES)
    for source in (str(root), "scenes"):
        with pytest.raises(UserError, match="unknown split 'vall'. Did you mean 'val'"):
            open_source(DataConfig(source, 16), "vall")


# -- the report ------------------------------------------------------------------------------------


def test_the_report_describes_a_source(tmp_path):
    root = grow(tmp_path / "r", [f"top/{n}" for n in NAMES])
    (root / "top" / "empty").mkdir()
    (root / "top" / "notes.txt").write_text("x")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 10)).save(root / "top" / "a" / "turned.jpg", exif=exif)
    (root / "top" / "b" / "0.png").write_bytes(b"no image")
    report = data_report(DataConfig(str(root)), 0)
    for line in (
        "61 images, ",
        "3 classes",
        "all of them lie in top/",
        "     0  a      21 images",
        "     2  c      20 images",
        "1 (.txt, no image), as top/notes.txt",
        "1 (a folder without images), as empty/",
        "formats: PNG (59), JPEG (1)",
        "modes: RGB (59), L (1)",
        "sizes: 16 x 16 (59), 10 x 20 (1)",
        "turned upright, as their cameras noted: 1",
        "cannot be read: 1: b/0.png (cannot identify image file",
    ):
        assert line in report, line
    assert "    23  " in data_report(DataConfig())


# -- cases that users reported ---------------------------------------------------------------------


OTHER_SPLITS = (
    ("train", "test1"),
    ("training_set", "test_set"),
    ("seg_train", "seg_test"),
    ("train2017", "val2017"),
    ("cars_train", "cars_test"),
    ("train", "unlabeled"),
    ("dev", "train"),
    ("train.X1", "val.X"),
)


@pytest.mark.parametrize("folders", OTHER_SPLITS)
def test_splits_under_other_names_are_no_classes(tmp_path, folders):
    with pytest.raises(UserError, match="which are no classes"):
        opened(grow(tmp_path / "r", [f"{f}/{n}" for f in folders for n in NAMES]))


def test_classes_that_sound_like_splits_are_classes(tmp_path):
    names = ("bullet_train", "steam_train", "crash_test", "bus", "validation")
    assert set(
        by_class(opened(grow(tmp_path / "r", [f"{f}/{i}.png" for f in names for i in range(3)])))
    ) == set(names)


def test_a_lost_class_is_an_error_however_few_its_files(tmp_path):
    root = grow(tmp_path / "r", [f"a/{i}.png" for i in range(300)])
    (root / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the class 'b' of .* is lost: b is a link to nothing"):
        opened(root)
    (root / "b").unlink()
    (root / "b").mkdir()
    (root / "b" / "0.heic").touch()
    with pytest.raises(UserError, match="the class 'b' of .* is lost: b/0.heic is .heic"):
        opened(root)


def test_folders_that_are_links_in_archives_are_followed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(20):
            archive.writestr(f"a/{i}.png", png(i))
        entry = zipfile.ZipInfo("b")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "a")
    assert by_class(opened(tmp_path / "a.zip")) == {"a": 20, "b": 20}


def test_an_empty_class_folder_is_reported(tmp_path, capsys):
    root = grow(tmp_path / "r", NAMES)
    (root / "d").mkdir()
    assert (
        len(opened(root)) == 60 and "1 (a folder without images), as d/" in capsys.readouterr().err
    )


def test_labels_need_class_folders(tmp_path):
    root = grow(tmp_path / "flat", [f"{i}.png" for i in range(8)])
    for labels in ("t.csv", "nowhere.txt"):
        with pytest.raises(
            UserError, match=f"the labels '{labels}' number class folders, and '{root}' has none"
        ):
            opened(root, labels=labels)


def test_labels_after_a_space_and_with_decomposed_letters(tmp_path):
    root = grow(tmp_path / "n", [f"caf\u00e9 {c}/{i}.png" for c in "ab" for i in range(9)])
    (tmp_path / "l.txt").write_text("cafe\u0301 b 0\ncafe\u0301 a 1\n")
    assert opened(root, labels=str(tmp_path / "l.txt")).classes == ["caf\u00e9 b", "caf\u00e9 a"]


def test_two_names_that_are_equal_when_composed_are_reported(tmp_path):
    root = grow(tmp_path / "n", ["a/caf\u00e9.png", "a/cafe\u0301.png", *NAMES])
    with pytest.raises(UserError, match="1 of 62 images .*of the same name as another"):
        opened(root)


def test_folders_of_network_storage_are_no_classes(tmp_path):
    names = [
        *NAMES,
        "@eaDir/a/0.jpg",
        "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/x.png",
        "lost+found/y.png",
    ]
    assert by_class(opened(grow(tmp_path / "r", names))) == {"a": 20, "b": 20, "c": 20}


@pytest.mark.parametrize(
    "source, message",
    (
        ("", "no source of images is named"),
        ("~nouser/x", "there are no images at"),
        ("{/a/x.tar,/b/y.tar}", "2 of 2 shards .* are not there"),
    ),
)
def test_sources_without_images_are_errors(source, message):
    with pytest.raises(UserError, match=message):
        opened(source)
