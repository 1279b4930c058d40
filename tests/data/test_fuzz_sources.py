"""Any tree of names and bytes, and any damaged archive, gives images with the right labels or one
message.
"""

import io
import os
import shutil
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gear.__main__ import main
from gear.config import UserError
from gear.data import DataConfig, open_source

pytestmark = pytest.mark.slow
SETTINGS = settings(
    derandomize=True, max_examples=500, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="/\\\0")
WORD = st.text(LETTERS, min_size=1, max_size=8).filter(lambda word: word not in (".", ".."))
EXTENSION = st.sampled_from([".png", ".PNG", ".jpg", ".gif", ".txt", "", ".json", ".heic", ".dat"])
CONTENT = st.one_of(
    st.integers(0, 255).map(png),
    st.sampled_from([b"", b"no image", png(3)[:40], b"\x89PNG\r\n\x1a\n"]),
)
FOLDER = st.one_of(st.sampled_from(["a", "b", "10", "9", "train", "val", ".hidden"]), WORD)
PATH = st.tuples(st.lists(FOLDER, max_size=3), WORD, EXTENSION).map(
    lambda parts: "/".join([*parts[0], parts[1] + parts[2]])
)
TREE = st.dictionaries(PATH, CONTENT, min_size=1, max_size=8)


def write_tree(root, tree):
    """Write the files of a tree; return those that the file system accepts.

    A path that is both a file and a folder, or a name that is too long, is not written.
    """
    written = {}
    for path, content in tree.items():
        file = root / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            written[path] = content
        except OSError:
            continue
    return written


def opened(path):
    """Open a source; return (source, None), or (None, message) if it is refused."""
    try:
        return open_source(DataConfig(str(path), 8), "all"), None
    except UserError as error:
        assert str(error)
        return None, str(error)


@SETTINGS
@given(TREE)
def test_any_tree_gives_images_with_their_labels_or_one_message(tree):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        tree = write_tree(root, tree)
        with (
            zipfile.ZipFile(f"{folder}/z.zip", "w") as archive,
            tarfile.open(f"{folder}/t.tar", "w") as tar,
        ):
            for path, content in tree.items():
                archive.writestr(path, content)
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        (source, message), *of_archives = (
            opened(path) for path in (root, f"{folder}/z.zip", f"{folder}/t.tar")
        )
        composed = {unicodedata.normalize("NFC", path): content for path, content in tree.items()}
        if message is None:
            assert len(source) + sum(map(len, source.store.census.reasons.values())) >= len(
                tree
            ) or ".hidden" in str(tree)
            for name, label in zip(source.names, source.labels(np.arange(len(source)))):
                assert source.store.top + name in composed
                if "/" in name:
                    assert source.classes[label] == name.split("/")[0]
            try:
                images = source.images(np.arange(len(source)))
            except UserError as error:
                assert "cannot be read" in str(error)
            else:
                for name, image in zip(source.names, images):
                    assert png(int(image[0, 0, 0])) == composed[source.store.top + name]
        if len(composed) == len(tree):
            for archive_source, archive_message in of_archives:
                assert (archive_message is None) == (message is None)
                if archive_source is not None:
                    has_same_classes = (
                        archive_source.classes == source.classes or len(source.classes) == 1
                    )  # the class of a flat source is named after its file
                    assert archive_source.names == source.names and has_same_classes


def assert_no_traceback(words, capsys):
    """Run a command, and check that it succeeds or ends with one message and exit code 2."""
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2
        assert capsys.readouterr().err.count("gear: ") == 1
    assert "Traceback" not in capsys.readouterr().err


def changes(content):
    """Return a strategy of damaged contents: bytes are cut, flipped, spliced or swapped."""
    offset = st.integers(0, len(content))
    cut = offset.map(lambda end: content[:end])
    flips = st.lists(
        st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=6
    )
    splice = st.tuples(offset, offset, st.binary(max_size=40)).map(
        lambda t: content[: t[0]] + t[2] + content[t[1] :]
    )
    swap = st.tuples(offset, offset, offset).map(
        lambda t: content[: t[0]] + content[t[1] : t[1] + 512] + content[t[2] :]
    )

    def flipped(pairs):
        damaged = bytearray(content)
        for index, mask in pairs:
            damaged[index] ^= mask
        return bytes(damaged)

    return st.one_of(cut, flips.map(flipped), splice, swap, st.binary(max_size=600))


def a_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(6):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", png(i))
    return file.getvalue()


def a_tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(4):
            for name, content in (
                (f"{i}{'n' * 100}.png", png(i)),
                (f"{i}{'n' * 100}.cls", str(i % 2).encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue().rstrip(b"\0") + bytes(1536)


def an_image():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content",
    (("x.zip", a_zip()), ("x.tar", a_tar()), ("x.jpg", an_image())),
    ids=("zip", "tar", "image"),
)
def test_a_damaged_archive_is_read_or_reported(name, content, tmp_path, capsys):
    @SETTINGS
    @given(changes(content))
    def check(damaged):
        (tmp_path / name).write_bytes(damaged)
        assert_no_traceback(["data", str(tmp_path / name)], capsys)
        shutil.rmtree(os.environ["GEAR_CACHE"], ignore_errors=True)

    check()


def test_a_damaged_file_of_labels_is_read_or_reported(tmp_path, capsys):
    for i in range(4):
        (tmp_path / "pets" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))

    @SETTINGS
    @given(
        st.one_of(
            changes(b"a,1\r\nb,0\r\n"), st.text(max_size=30).map(lambda text: text.encode("utf-16"))
        )
    )
    def check(damaged):
        (tmp_path / "labels.txt").write_bytes(damaged)
        assert_no_traceback(
            ["data", str(tmp_path / "pets"), "--labels", str(tmp_path / "labels.txt")], capsys
        )

    check()
