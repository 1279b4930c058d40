"""Tar shards behave like a folder: they are split by name, sample n is a function of (seed, n), and
a bad shard gives a message.
"""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import assert_same_run
from PIL import Image

from gear import data
from gear.config import UserError
from gear.data import DataConfig, open_source, tars
from gear.experiments.recipes import recipe
from gear.runs.run import Run
from gear.training.loop import Runtime, train

SHARDS = 10
SAMPLES = 9  # per shard


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(number):
    out = io.BytesIO()
    Image.fromarray(pixels(number)).save(out, "PNG")
    return out.getvalue()


def write_shard(path, samples):
    """Write {file name: bytes} as a tar and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def sample(number, label=None):
    """Return the files of a sample, {name: bytes}: its image, and its class number % 3 in the form
    `label` ("cls", "json" or None).
    """
    kinds = {
        "cls": (".cls", str(number % 3).encode()),
        "json": (".json", json.dumps({"label": number % 3}).encode()),
    }
    extension, content = kinds.get(label, (None, None))
    return {f"{number:03d}.png": encoded(number)} | (
        {f"{number:03d}{extension}": content} if extension else {}
    )


def write_shards(folder, label="cls"):
    for s in range(SHARDS):
        files = [sample(s * SAMPLES + i, label) for i in range(SAMPLES)]
        write_shard(
            folder / f"train-{s:06d}.tar", {k: v for part in files for k, v in part.items()}
        )
    return DataConfig(source=str(folder), image_size=16, flip=False)


@pytest.fixture
def config(tmp_path):
    return write_shards(tmp_path / "shards")


def number(name):
    return int(name.replace(":", "/").split("/")[-1])


@pytest.mark.parametrize("label", ("cls", "json"))
def test_images_and_labels_are_those_of_the_shards_and_splits_are_disjoint(tmp_path, label):
    config = write_shards(tmp_path / label, label)
    train = open_source(config, "train")
    val = open_source(config, "val")
    assert (
        sorted(number(n) for n in train.names + val.names) == list(range(90))
        and 1 <= len(val) <= 12
    )
    assert train.classes == ["00000", "00001", "00002"] and data.num_classes(config) == 3
    for position, name in enumerate(train.names):
        np.testing.assert_array_equal(train.images([position])[0], pixels(number(name)))
        assert train.labels(position) == number(name) % 3


def test_shards_without_labels_are_one_class_which_is_reported(tmp_path, capsys):
    assert open_source(write_shards(tmp_path / "bare", None), "train").classes == ["bare"]
    assert (
        "bare: 10 shards with neither labels nor class folders are one class"
        in capsys.readouterr().err
    )


def test_a_list_of_shards_equals_their_folder(config):
    spec = replace(config, source=f"{config.source}/train-{{000000..000009}}.tar")
    of_folder, of_list = (open_source(c, "train") for c in (config, spec))
    assert of_folder.names == of_list.names and of_folder.identity() == of_list.identity()


def samples_of(config, total, batch_size, start=0, workers=0):
    batches = islice(data.stream(config, 3, batch_size, start, workers), total // batch_size)
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stream_from_sample_n_is_the_tail_of_the_stream(config, workers):
    config = replace(config, flip=True)
    images, labels = samples_of(config, 200, 8)
    for start, batch_size in ((24, 8), (100, 4), (7, 1)):
        tail, tail_labels = samples_of(config, 24, batch_size, start, workers)
        assert torch.equal(tail, images[start : start + 24]) and torch.equal(
            tail_labels, labels[start : start + 24]
        )


def test_an_epoch_shows_every_image_once_and_reads_a_few_shards_at_a_time(config, monkeypatch):
    monkeypatch.setattr(tars, "GROUP", 2)
    source = open_source(config, "train")
    orders = [source.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(len(source))) and list(orders[0]) == list(
        orders[1]
    ) != list(orders[2])
    shard = [number(source.names[p]) // SAMPLES for p in orders[0]]
    changes = sum(a != b for a, b in zip(shard, shard[1:]))
    assert (
        len(set(shard[:14])) == 2 and changes > 2 * SHARDS
    )  # samples of two shards at a time are mixed


def test_a_run_on_shards_resumes_to_the_same_bytes(config, home):
    short = replace(recipe("tiny-tokenizer"), data=config, steps=12, eval_images=4)
    short = replace(short, tokenizer=replace(short.tokenizer, init_from_data=False))
    for name in ("whole", "cut"):
        train(short, name, Runtime(device="cpu", quiet=True))
    shutil.rmtree(home / "runs" / "cut" / "checkpoints" / "0000012")
    assert Run.open("cut").step == 6
    train(short, "cut", Runtime(device="cpu", quiet=True))
    assert_same_run(home / "runs" / "cut", home / "runs" / "whole")


def test_a_cached_run_on_shards_equals_an_uncached_one(config, tiny):
    runs = [
        replace(
            recipe("tiny"),
            data=config,
            steps=6,
            eval_images=4,
            generator=replace(recipe("tiny").generator, num_classes=3),
        )
    ] * 2
    for name, cached, c in zip(("plain", "cached"), (False, True), runs):
        train(c, name, Runtime(device="cpu", quiet=True, cached=cached))
    assert_same_run(tiny / "plain", tiny / "cached")


def test_the_list_of_a_shard_is_kept_until_the_shard_changes(config, home, monkeypatch):
    open_source(config, "train")
    tars._members.cache_clear()
    opened = []
    read_members = tars._read_members
    monkeypatch.setattr(
        tars,
        "_read_members",
        lambda path, size: (opened.append(path.name), read_members(path, size))[1],
    )
    assert len(open_source(config, "all")) == 90 and not opened
    changed = write_shard(home / "shards" / "train-000003.tar", sample(500, "cls"))
    assert len(open_source(config, "all")) == 82 and opened == [changed.name]


# -- bad shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", (1024, 700, 5000, 0, -1024))
def test_a_cut_shard_is_named(config, home, keep):
    path = home / "shards" / "train-000004.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    path.write_bytes(content[:keep] if keep >= 0 else content[: end - 100])
    with pytest.raises(
        UserError,
        match=r"the shard .*train-000004.tar is cut short, or is no plain tar.*write it again",
    ):
        open_source(config, "train")


def test_a_shard_of_garbage_is_named(config, home):
    (home / "shards" / "train-000004.tar").write_bytes(b"\xff" * 2048 + bytes(1024))
    with pytest.raises(UserError, match=r"the shard .*train-000004.tar cannot be read"):
        open_source(config, "train")


def test_samples_without_label_or_image_are_named(config, home):
    extra = home / "shards" / "train-000010.tar"
    for files, message in (
        (sample(90), "sample '090' has no label, others have. Add 090.cls"),
        (sample(92) | {"092.cls": b"cat"}, "label of sample '092' is no number"),
        (sample(93) | {"093.json": b'{"label": "cat"}'}, "label of sample '093' is no number"),
        (sample(94) | {"094.json": b"[3]"}, "label of sample '094' is no number"),
    ):
        write_shard(extra, files)
        with pytest.raises(UserError, match=f"train-000010.tar: .*{message}"):
            open_source(config, "train")


def test_a_label_without_its_image_is_counted(config, home):
    write_shard(home / "shards" / "train-000010.tar", {"091.cls": b"1", "092.txt": b"a"})
    with pytest.raises(
        UserError,
        match="1 of 91 images .* cannot be taken, over 1%: 1 .a label without its image.: .*091.cls",
    ):
        open_source(config, "train")


def test_missing_shards_and_names_used_twice(config, home):
    with pytest.raises(
        UserError,
        match=r"2 of 12 shards of .* are not there \(.*000010.tar, .*000011.tar\): a folder",
    ):
        open_source(
            replace(config, source=f"{config.source}/train-{{000000..000011}}.tar"), "train"
        )
    shutil.copytree(home / "shards", home / "again")
    with pytest.raises(UserError, match="share a file name"):
        open_source(replace(config, source=f"{home}/{{shards,again}}/train-000000.tar"), "train")


def test_a_folder_of_images_with_a_tar_beside_them_stays_a_folder(tmp_path):
    for i in range(9):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    write_shard(tmp_path / "images" / "backup.tar", sample(0))
    assert open_source(
        DataConfig(source=str(tmp_path / "images"), image_size=16), "all"
    ).classes == ["a", "b"]


def test_an_unreadable_image_of_a_shard_is_replaced(config, home, monkeypatch, capsys):
    monkeypatch.setattr("gear.data.folders.UNREADABLE_SHARE", 0.1)
    write_shard(home / "shards" / "train-000000.tar", {"000.png": b"no image", "000.cls": b"0"})
    assert (
        len(data.load(config, "all")[0]) == 82
        and "000 cannot be read (not an image)" in capsys.readouterr().err
    )


# -- layouts that packers write --------------------------------------------------------------------


def flat(value):
    """Return the bytes of a PNG of one grey."""
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def pack(path, members, **options):
    """Write `members`, (name, bytes) for a file and (name, target) for a symbolic link, as a tar.

    A name may occur several times. Returns the path.
    """
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type = tarfile.SYMTYPE
                entry.linkname = content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def greys(path):
    """Return the classes of a source and {grey: label} of its images."""
    source = open_source(DataConfig(str(path), 16), "all")
    positions = np.arange(len(source))
    values = source.images(positions)[:, 0, 0, 0].tolist()
    assert len(set(values)) == len(values)
    return source.classes, dict(zip(values, source.labels(positions).tolist()))


def pair(k, key=None):
    """Return the image of class k, which is grey by 50 k, and its label."""
    return [(f"{key or k}.png", flat(50 * k)), (f"{key or k}.cls", str(k).encode())]


FOUR = ["00000", "00001", "00002", "00003"], {0: 0, 50: 1, 100: 2, 150: 3}
LONG = "n" * 101
LAYOUTS = {
    "plain": [m for k in range(4) for m in pair(k)],
    "long names": [m for k in range(4) for m in pair(k, f"{LONG}{k}")],
    "long folders": [m for k in range(4) for m in pair(k, f"{'d' * 90}/{LONG}{k}")],
    "dots in names": [m for k in range(4) for m in pair(k, f"IMG_2020.01.{k}")],
    "other letters": [m for k in range(4) for m in pair(k, f"caf\u00e9 \u732b {k}")],
    "bytes that are no UTF-8": [m for k in range(4) for m in pair(k, f"caf\udce9 {k}")],
    "a Mac's companions": [
        m for k in range(4) for n, b in pair(k) for m in ((f"._{n}", b"\0\5\26\7"), (n, b))
    ],
    "a Mac's folder": [(".DS_Store", b"x"), *(m for k in range(4) for m in pair(k))],
    "names that begin with a dot": [m for k in range(4) for m in pair(k, f"./{k}")],
    "images before labels": [(f"{k}.png", flat(50 * k)) for k in range(4)]
    + [(f"{k}.cls", str(k).encode()) for k in range(4)],
    "labels first": [(f"{k}.cls", b"%d" % k) for k in (3, 1, 2, 0)]
    + [(f"{k}.png", flat(50 * k)) for k in range(4)],
    "a sample twice": [m for k in (0, 0, 1, 2, 3) for m in pair(k)],
    "an old copy first": [("1.png", flat(7)), *(m for k in range(4) for m in pair(k))],
    "a mask beside each": [m for k in range(4) for m in (*pair(k), (f"{k}.seg.png", flat(9)))],
    "captions": [
        m
        for k in range(4)
        for m in (*pair(k), (f"{k}.txt", b"a cat"), (f"{k}.json", b'{"caption": "x"}'))
    ],
    "capital extensions": [(n.replace("png", "PNG"), b) for k in range(4) for n, b in pair(k)],
    "labels with a mark": [
        (n, b if b[:1] == b"\x89" else b"\xef\xbb\xbf" + b + b"\r\n")
        for k in range(4)
        for n, b in pair(k)
    ],
    "a linked label": [
        ("0.png", flat(0)),
        ("0.cls", "zero"),
        ("zero", b"0"),
        *(m for k in (1, 2, 3) for m in pair(k)),
    ],
}


@pytest.mark.parametrize(
    "format",
    (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT),
    ids=("ustar", "gnu", "pax"),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_labelled_images_are_read_from_every_layout(tmp_path, layout, format):
    if format == tarfile.USTAR_FORMAT and layout.startswith("long"):
        pytest.skip("ustar has no such names")
    assert greys(pack(tmp_path / "a.tar", LAYOUTS[layout], format=format)) == FOUR


def test_all_of_several_concatenated_tars_are_read(tmp_path):
    first, second = (
        pack(tmp_path / f"{i}.tar", [m for k in ks for m in pair(k)])
        for i, ks in enumerate(((0, 1), (2, 3)))
    )
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    assert greys(tmp_path / "both.tar") == FOUR
    content = bytearray((tmp_path / "both.tar").read_bytes())
    content[len(first.read_bytes()) + 148] ^= 255  # a checksum of the second tar
    (tmp_path / "both.tar").write_bytes(content)
    with pytest.raises(UserError, match="both.tar cannot be read .no header at byte 10240."):
        greys(tmp_path / "both.tar")


def test_a_file_that_occurs_twice_is_reported(tmp_path, capsys):
    members = [("0.png", flat(0)), ("0.png", flat(5)), ("0.cls", b"0"), *pair(1)]
    assert greys(pack(tmp_path / "a.tar", members)) == (FOUR[0][:2], {5: 0, 50: 1})
    assert (
        "1 (an earlier copy of what stands there twice), as a.tar/0.png" in capsys.readouterr().err
    )


def test_two_images_with_one_key_are_both_read(tmp_path):
    bitmap = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(bitmap, "BMP")
    assert greys(pack(tmp_path / "a.tar", [*pair(0), ("0.bmp", bitmap.getvalue()), *pair(1)]))[
        1
    ] == {0: 0, 200: 0, 50: 1}


def test_class_folders_in_a_tar_equal_those_of_the_folder(tmp_path):
    members = [(f"pets/{'ab'[k % 2]}/{k}.png", flat(k)) for k in range(40)]
    packed = open_source(DataConfig(str(pack(tmp_path / "a.tar", members)), 16), "train")
    for name, content in members:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = open_source(DataConfig(str(tmp_path / "pets"), 16), "train")
    assert packed.names == folder.names and packed.classes == folder.classes == ["a", "b"]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "pets", "pets")
    (tmp_path / "c").write_bytes(
        (tmp_path / "b.tar").read_bytes()
    )  # recognised by its content, without an extension
    for source in (
        open_source(DataConfig(str(tmp_path / name), 16), "train") for name in ("b.tar", "c")
    ):
        assert source.names == folder.names
        np.testing.assert_array_equal(source.images([0, 1]), folder.images([0, 1]))


@pytest.mark.parametrize(
    "label", (b"3.5", b"true", b'"3.5"', b"-1", b"[1]", b"NaN", b"Infinity", b"1e400", b"9" * 5000)
)
def test_a_label_that_is_no_class_number_is_refused(tmp_path, label):
    members = [*pair(0), ("1.png", flat(50)), ("1.json", b'{"label": ' + label + b"}")]
    with pytest.raises(UserError, match="the label of sample '1' is"):
        greys(pack(tmp_path / "a.tar", members))


def test_links_to_nothing_and_damaged_headers_are_errors(tmp_path):
    with pytest.raises(
        UserError, match="1 of 3 images .*a link to nothing, or no plain file.: a.tar/9.png"
    ):
        greys(pack(tmp_path / "a.tar", [*pair(0), *pair(1), ("9.png", "8.png")]))
    content = bytearray(pack(tmp_path / "b.tar", LAYOUTS["plain"]).read_bytes())
    content[124:135] = b"77777777777"  # an impossible length
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(UserError, match="b.tar cannot be read"):
        greys(tmp_path / "b.tar")


def test_a_damaged_list_in_the_cache_is_made_again(tmp_path, home):
    path = pack(tmp_path / "a.tar", LAYOUTS["plain"])
    assert greys(path) == FOUR
    (cached,) = (home / "cache" / "shards").glob("*.json")
    content = cached.read_text()
    for damage in ("", content[:-9], content.replace("0.png", "0.txt"), "[]", "null"):
        cached.write_text(damage)
        tars._members.cache_clear()
        assert greys(path) == FOUR and cached.read_text() == content


def test_a_packed_tar_and_a_brace_in_a_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(
        UserError,
        match="a.tar.gz' is not a zip, a tar or an image. A packed tar .* has to be unpacked",
    ):
        greys(tmp_path / "a.tar.gz")
    assert (
        greys(pack(tmp_path / "{0,1}.tar", LAYOUTS["plain"])) == FOUR
    )  # a file of that name takes precedence over the pattern
    with pytest.raises(UserError, match="1 of 1 shards .* are not there"):
        greys(tmp_path / "{0.tar")


# -- cases that users reported ---------------------------------------------------------------------


def test_labels_keep_their_numbers(tmp_path):
    """A class without images keeps its number, as in a subset of ImageNet."""
    classes, labels = greys(
        pack(tmp_path / "a.tar", [*pair(3), ("x.png", flat(9)), ("x.cls", b"5")])
    )
    assert labels == {150: 3, 9: 5} and classes == [f"{i:05d}" for i in range(6)]


def test_class_folders_in_several_shards_are_classes(tmp_path):
    for shard in range(2):
        pack(
            tmp_path / f"{shard}.tar",
            [(f"train/{c}/{i}.png", flat(20 * shard + i)) for c in "ab" for i in range(3)],
        )
    source = open_source(DataConfig(str(tmp_path), 16), "all")
    assert (
        source.classes == ["a", "b"]
        and len(source) == 12
        and source.images([0]).shape == (1, 16, 16, 3)
    )
    splits = tmp_path / "splits"
    splits.mkdir()
    for split in ("train", "val"):
        pack(
            splits / f"{split}.tar",
            [(f"{split}/{c}/{i}.png", flat(i)) for c in "ab" for i in range(3)],
        )
    with pytest.raises(UserError, match="holds the splits train, val, which are no classes"):
        open_source(DataConfig(str(splits), 16), "all")


def test_labels_with_extensions_in_capitals_are_read(tmp_path):
    assert (
        greys(
            pack(
                tmp_path / "a.tar",
                [
                    m
                    for k in range(4)
                    for m in ((f"{k}.PNG", flat(50 * k)), (f"{k}.CLS", b"%d" % k))
                ],
            )
        )
        == FOUR
    )


def test_shards_beside_loose_images_are_ambiguous(tmp_path):
    pack(tmp_path / "0.tar", LAYOUTS["plain"])
    (tmp_path / "preview.png").write_bytes(flat(3))
    with pytest.raises(
        UserError, match="holds 1 images .preview.png. and 1 shards .0.tar.: which are meant"
    ):
        open_source(DataConfig(str(tmp_path), 16), "all")


def test_a_folder_that_is_a_link_in_a_tar_is_followed(tmp_path):
    members = [(f"a/{i}.png", flat(i)) for i in range(9)] + [("b", "a")]
    assert open_source(DataConfig(str(pack(tmp_path / "a.tar", members)), 16), "all").classes == [
        "a",
        "b",
    ]
