"""Splits never overlap, sample n of the stream is a function of (seed, n), and a bad folder gives
a message that names the fault.
"""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from gear import data
from gear.config import UserError
from gear.data import DataConfig, folders, open_source
from gear.images import to_float, to_uint8

SCENES = DataConfig(image_size=16, train_images=20, val_images=10)


def paint(path, size=(24, 20), seed=0):
    """Save a PNG of random pixels, so that all images and all their crops differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Save ninety images in three class folders, one of them with a sub-folder."""
    for i in range(90):
        paint(tmp_path / "images" / ("ant", "bee/wild", "cat")[i % 3] / f"{i:02d}.png", seed=i)
    return DataConfig(source=str(tmp_path / "images"), image_size=16)


def names(config, split):
    return [Path(n).name for n in open_source(config, split).names]


# -- splits ----------------------------------------------------------------------------------------


def test_scene_splits_are_disjoint_ranges_of_numbers():
    huge = replace(SCENES, train_images=10**9, val_images=10**9)
    train = open_source(huge, "train")
    val = open_source(huge, "val")
    assert train.first + train.length <= val.first and len(train) == len(val) == 10**9
    first = {split: data.load(SCENES, split)[0].flatten(1) for split in ("train", "val")}
    assert torch.cdist(first["train"], first["val"]).min() > 1 and (
        len(first["train"]),
        len(first["val"]),
    ) == (20, 10)


def test_folder_splits_are_disjoint_and_complete(folder):
    train = names(folder, "train")
    val = names(folder, "val")
    assert not set(train) & set(val) and sorted(train + val) == [f"{i:02d}.png" for i in range(90)]
    assert 1 <= len(val) <= 12


def test_a_file_keeps_its_split_when_others_are_added(folder, tmp_path):
    train = set(names(folder, "train"))
    val = set(names(folder, "val"))
    for i in range(60):
        paint(tmp_path / "images" / ("ant", "dog")[i % 2] / f"new{i}.png")
    assert train <= set(names(folder, "train")) and val <= set(names(folder, "val"))
    assert len(names(folder, "train")) + len(names(folder, "val")) == 150


def test_two_images_are_enough_for_a_split(tmp_path):
    for i in range(2):
        paint(tmp_path / "two" / f"{i}.png")
    config = DataConfig(source=str(tmp_path / "two"), image_size=16)
    assert sorted(names(config, "train") + names(config, "val")) == ["0.png", "1.png"]


# -- folders ---------------------------------------------------------------------------------------


def test_validation_images_may_be_in_another_folder(folder, tmp_path):
    """All images of the source are then for training, as with ImageNet's own validation set."""
    val_folder = tmp_path / "val"
    classes = ["ant", "bee", "cat"]
    for i, name in enumerate(classes):
        (val_folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(val_folder / name / "x.png")
    config = replace(folder, val_source=str(val_folder))
    train, val, all_images = (open_source(config, split) for split in ("train", "val", "all"))
    assert len(train) == len(all_images) == len(open_source(replace(config, val_source=""), "all"))
    assert len(val) == 3 and val.classes == train.classes == classes
    images, labels = data.load(config, "val")
    assert sorted(labels.tolist()) == [0, 1, 2]
    for pixels, label in zip(to_uint8(images), labels):
        assert (pixels[..., 0] == 10 * label).all()
    assert data.absolute(replace(config, val_source="val")).val_source == str(
        Path("val").absolute()
    )


def test_validation_images_of_other_classes_are_an_error(folder, tmp_path):
    (tmp_path / "val" / "stranger").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "val" / "stranger" / "x.png")
    config = replace(folder, val_source=str(tmp_path / "val"))
    with pytest.raises(
        UserError, match="val_source: '.*val' has 1 classes .stranger, .* '.*images' 3: sort"
    ):
        open_source(config, "val")
    with pytest.raises(UserError, match="val_source: there are no images at 'nowhere'"):
        open_source(replace(config, val_source="nowhere"), "val")
    with pytest.raises(UserError, match="val_source is for folders, zips and tars: 'scenes' has"):
        open_source(DataConfig(val_source=str(tmp_path)), "val")


def test_sub_folders_are_classes(folder, tmp_path):
    (tmp_path / "images" / "empty").mkdir()
    assert data.num_classes(folder) == 3
    for split in ("train", "val"):
        source = open_source(folder, split)
        assert source.classes == ["ant", "bee", "cat"]
        assert source.labels(np.arange(len(source))).tolist() == [
            int(Path(n).stem) % 3 for n in source.names
        ]


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        paint(tmp_path / "flat" / f"{i}.png")
    config = DataConfig(source=str(tmp_path / "flat"), image_size=16)
    assert open_source(config, "train").classes == ["flat"] and data.num_classes(config) == 1
    assert data.load(config, "train")[1].tolist() == [0, 0, 0, 0]


def test_the_message_for_a_missing_folder_names_the_path(tmp_path):
    with pytest.raises(UserError, match=r"there are no images at '.*/nowhere'"):
        open_source(DataConfig(source=str(tmp_path / "nowhere")), "train")


def test_the_message_for_a_folder_without_images_names_the_path(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=rf"'{tmp_path}' holds no images .*\.png"):
        open_source(DataConfig(source=str(tmp_path)), "train")


def test_one_image_is_too_few_for_two_splits(tmp_path):
    paint(tmp_path / "one" / "0.png")
    with pytest.raises(UserError, match="too few images .1.: none is left for the split .train"):
        open_source(DataConfig(source=str(tmp_path / "one")), "train")


def test_images_beside_class_folders_are_an_error(folder):
    paint(Path(folder.source) / "loose.png")
    with pytest.raises(UserError, match="1 images beside them .loose.png."):
        open_source(folder, "train")


def spoil(folder, count, kind="text"):
    """Make the first `count` training images unreadable; returns their paths."""
    paths = [Path(folder.source) / n for n in open_source(folder, "train").names[:count]]
    for path in paths:
        path.write_bytes(b"no image" if kind == "text" else path.read_bytes()[:600])
    return paths


@pytest.mark.parametrize("workers", (0, 2))
def test_unreadable_images_of_the_stream_give_one_message(folder, workers):
    spoil(folder, 80)
    with pytest.raises(
        UserError, match=r"^1 of \d+ images cannot be read, over 1%: \S+png"
    ) as error:
        next(data.stream(folder, seed=0, batch_size=60, workers=workers))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("kind", ("text", "truncated"))
def test_one_unreadable_image_in_a_hundred_is_named_and_replaced_by_its_class(
    folder, kind, monkeypatch, capsys
):
    monkeypatch.setattr(folders, "UNREADABLE_SHARE", 0.02)
    (path,) = spoil(folder, 1, kind)
    source = open_source(folder, "train")
    label = source.labels(np.array([0]))[0]
    replacement = next(i for i in range(1, len(source)) if source.labels(np.array([i]))[0] == label)
    np.testing.assert_array_equal(
        source.images(np.array([0])), source.images(np.array([replacement]))
    )
    source.images(np.array([0]))
    output = capsys.readouterr().err
    assert output.count(str(path)) == 1 and "1 so far" in output


def zipped(folder, tmp_path, top=""):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in Path(folder.source).rglob("*.png"):
            archive.write(file, f"{top}{file.relative_to(folder.source)}")
        archive.writestr("readme.txt", "not an image")
    return replace(folder, source=str(path))


@pytest.mark.parametrize("top", ("", "train/"))
def test_a_zip_is_read_in_place_and_equals_its_folder(folder, tmp_path, top):
    packed = zipped(folder, tmp_path, top)
    of_folder = open_source(folder, "train")
    of_zip = open_source(packed, "train")
    assert of_folder.names == of_zip.names and of_folder.classes == of_zip.classes
    for workers in (0, 2):
        samples, zip_samples = (
            samples_of(config, 40, 8, workers=workers) for config in (folder, packed)
        )
        assert torch.equal(samples[0], zip_samples[0]) and torch.equal(samples[1], zip_samples[1])


def test_a_zip_is_opened_once_per_process(folder, tmp_path, monkeypatch):
    """Opening reads the directory of the archive; doing that for every image would take far longer
    than reading the images.
    """
    opened = []
    zip_file = zipfile.ZipFile
    packed = zipped(folder, tmp_path)
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or zip_file(path))
    open_source(packed, "train").images(np.arange(30))
    assert len(opened) == 1


def test_a_file_that_is_no_zip_and_a_zip_without_images_are_errors(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip at all")
    with pytest.raises(UserError, match="a.zip' is not a zip"):
        open_source(DataConfig(source=str(tmp_path / "a.zip")), "train")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(UserError, match="b.zip' holds no images"):
        open_source(DataConfig(source=str(tmp_path / "b.zip")), "train")


def test_factors_need_scenes(folder):
    with pytest.raises(UserError, match="labels 'factors' need the source 'scenes'"):
        open_source(replace(folder, labels="factors"), "train")


# -- downloads -------------------------------------------------------------------------------------


def test_a_failed_download_names_the_folder_the_address_and_an_alternative(home, monkeypatch):
    """The number of classes is known without the download."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    config = DataConfig(source="cifar10")
    assert data.num_classes(config) == 10 and not (home / "cache").exists()
    with pytest.raises(UserError) as error:
        open_source(config, "train")
    for part in (
        f"'cifar10' is not in {home / 'cache' / 'cifar10'}",
        "toronto.edu/~kriz/cifar-10",
        "Use a folder or a zip of class folders instead",
    ):
        assert part in str(error.value)


PIXELS = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), np.uint8)


@pytest.fixture
def little_cifar(tmp_path, monkeypatch):
    """Serve an archive like that of CIFAR-10, with 60 images in three classes, as "cifar10".

    Returns the server.
    """

    def pack(archive, name, content):
        content = pickle.dumps(content)
        info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
        return name, hashlib.md5(content).hexdigest()

    path = tmp_path / "little.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        batch = pack(
            archive, "batch", {"data": PIXELS.reshape(60, -1), "labels": [i % 3 for i in range(60)]}
        )
        names, md5 = pack(archive, "meta", {"label_names": ["ant", "bee", "cat"]})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    class Little(datasets.CIFAR10):
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        tgz_md5 = hashlib.md5(path.read_bytes()).hexdigest()
        train_list = [batch]
        test_list = []
        meta = {"filename": names, "key": "label_names", "md5": md5}

    monkeypatch.setattr(datasets, "CIFAR10", Little)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.server_close()


def test_a_download_is_kept_and_split_like_a_folder(little_cifar):
    config = DataConfig(source="cifar10")
    open_source(config, "train")
    little_cifar.shutdown()  # there is no network from here on
    little_cifar.server_close()
    train = open_source(config, "train")
    val = open_source(config, "val")
    assert (
        not set(train.names) & set(val.names) and len(train) + len(val) == 60 and 1 <= len(val) < 10
    )
    assert train.classes == ["ant", "bee", "cat"]
    for position, name in enumerate(train.names):
        folder, number = name.split("/")
        assert train.labels(position) == int(number) % 3 == train.classes.index(folder)
        np.testing.assert_array_equal(
            train.images([position])[0], PIXELS[int(number)].transpose(1, 2, 0)
        )
    assert next(data.stream(config, 0, 5, workers=2))[0].shape == (5, 32, 32, 3)


# -- resize and crop -------------------------------------------------------------------------------

BANDS = np.repeat(
    np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 32, 0
)  # 96 pixels: red, green, blue


@pytest.mark.parametrize("wide", (True, False))
def test_resize_keeps_the_short_side_and_crops_the_centre(tmp_path, wide):
    """The image consists of three square bands: the centre is green, the ends are red and blue."""
    image = np.broadcast_to(
        BANDS[None] if wide else BANDS[:, None], (32, 96, 3) if wide else (96, 32, 3)
    )
    for i in range(2):
        path = tmp_path / "bands" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(path)
    source = open_source(
        DataConfig(source=str(tmp_path / "bands"), image_size=16, interpolation="box"), "train"
    )
    for draws, colour in ((None, 1), (np.zeros((1, 2)), 0), (np.full((1, 2), 1 - 1e-9), 2)):
        images = source.images([0], draws)
        assert images.shape == (1, 16, 16, 3)
        assert (images == 255 * np.eye(3, dtype=np.uint8)[colour]).all()


def test_an_image_of_the_right_size_is_not_changed(tmp_path):
    for i in range(2):
        paint(tmp_path / "exact" / f"{i}.png", size=(16, 16), seed=i)
    source = open_source(DataConfig(source=str(tmp_path / "exact"), image_size=16), "train")
    np.testing.assert_array_equal(
        source.images([0])[0], np.asarray(Image.open(Path(source.path) / source.names[0]))
    )


# -- the stream ------------------------------------------------------------------------------------


def samples_of(config, total, batch_size, start=0, workers=0, seed=3):
    """Return the samples `start` to `start + total` of the stream and their labels."""
    batches = islice(data.stream(config, seed, batch_size, start, workers), total // batch_size)
    images, labels = zip(*batches)
    return data.to_float(torch.cat(images)), torch.cat(labels)


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("source", ("scenes", "folder"))
def test_a_stream_from_sample_n_is_the_tail_of_the_stream(source, workers, folder):
    """This includes crops, flips and the order of later epochs, for any batch size."""
    config = replace(SCENES if source == "scenes" else folder, flip=True)
    images, labels = samples_of(config, 120, 8)
    for start, batch_size in ((24, 8), (60, 6), (7, 1)):
        tail, tail_labels = samples_of(config, 24, batch_size, start, workers)
        assert torch.equal(tail, images[start : start + 24])
        assert torch.equal(tail_labels, labels[start : start + 24])


def test_each_epoch_shows_every_image_once_in_its_own_order():
    images = samples_of(SCENES, 60, 5)[0].flatten(1)
    in_order = data.load(SCENES, "train")[0].flatten(1)
    order = torch.cdist(images, in_order).argmin(1).view(3, 20)
    assert torch.equal(images, in_order[order.flatten()])
    assert (order.sort(1).values == torch.arange(20)).all() and not torch.equal(order[0], order[1])


def test_the_order_depends_on_the_seed():
    assert not torch.equal(samples_of(SCENES, 20, 20)[0], samples_of(SCENES, 20, 20, seed=4)[0])


def test_flip_mirrors_half_of_a_folder_and_no_scene(folder):
    square = replace(
        folder, image_size=20
    )  # the short side of the images: crops move along the long side, equally with and without flips
    plain, flipped = (samples_of(replace(square, flip=flip), 90, 30)[0] for flip in (False, True))
    is_equal = (flipped == plain).flatten(1).all(1)
    is_mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert (is_equal ^ is_mirrored).all() and 25 < is_mirrored.sum() < 65
    without_flip, with_flip = (
        samples_of(replace(SCENES, flip=flip), 20, 20)[0] for flip in (False, True)
    )
    assert torch.equal(without_flip, with_flip)


def test_the_stream_draws_nothing_from_the_global_generator():
    """Otherwise the first step after a resume would drop other labels than the same step of an
    uninterrupted run.
    """
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = data.stream(SCENES, 0, 4)
    next(stream)
    next(stream)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_images_of_a_folder_are_of_all_classes(folder):
    assert set(data.load(folder, "train", count=20)[1].tolist()) == {0, 1, 2}


def test_factor_labels_match_their_images():
    images, factors = next(data.stream(replace(SCENES, labels="factors"), 0, 6))
    in_order = data.load(SCENES, "train")[0]
    source = open_source(SCENES, "train")
    positions = torch.cdist(data.to_float(images).flatten(1), in_order.flatten(1)).argmin(1).numpy()
    np.testing.assert_array_equal(factors, source.factors(positions, 4))


def test_load_takes_the_first_and_never_flips(folder):
    images, labels = data.load(replace(folder, flip=True), "train")
    part, part_labels = data.load(replace(folder, flip=False), "train", count=4)
    assert torch.equal(part, images[:4]) and torch.equal(part_labels, labels[:4])
    assert len(data.load(SCENES, "val", count=99)[0]) == 10


@pytest.mark.parametrize("count", (0, -1, 2.5, "4"))
def test_an_invalid_count_is_an_error(count):
    with pytest.raises(UserError, match="count is"):
        data.load(SCENES, "val", count)


# -- ranges ----------------------------------------------------------------------------------------


def test_uint8_survives_the_round_trip_and_fills_the_range():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.shape == (1, 3, 16, 16)
    assert (floats.min(), floats.max()) == (-1, 1)
    torch.testing.assert_close(floats[0, 0].flatten(), torch.linspace(-1, 1, 256))
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_clamps_and_rounds_half_up():
    x = torch.tensor([-9.0, 9.0, 0.0, 2.49 / 127.5 - 1, 2.51 / 127.5 - 1]).view(1, 1, 1, 5)
    assert to_uint8(x).flatten().tolist() == [0, 255, 128, 2, 3]
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="the images hold values that are not finite"):
            to_uint8(torch.full((1, 3, 4, 4), bad))


def test_an_image_whose_decoder_raises_an_unusual_error_is_skipped(tmp_path, capsys):
    """A PNG whose pixels continue in a chunk with a broken name raises no OSError."""
    for i in range(200):
        paint(tmp_path / "pics" / "ab"[i % 2] / f"{i}.png", seed=i)
    path = tmp_path / "pics" / "a" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    offset = content.rindex(b"IDAT")
    assert offset > content.index(b"IDAT")
    content[offset : offset + 4] = b"I\x00AT"
    path.write_bytes(content)
    images = [
        data.load(DataConfig(source=str(tmp_path / "pics"), image_size=16), split)[0]
        for split in ("train", "val")
    ]
    assert sum(map(len, images)) == 200 and "0.png cannot be read" in capsys.readouterr().err


def test_the_message_for_an_encrypted_zip_says_that_it_is_encrypted(tmp_path):
    path = tmp_path / "locked.zip"
    paint(tmp_path / "one.png")
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40):
            archive.write(tmp_path / "one.png", f"a/{i}.png")
    content = bytearray(path.read_bytes())
    for signature, offset in (
        (b"PK\x03\x04", 6),
        (b"PK\x01\x02", 8),
    ):  # sets the flag "encrypted" of every entry
        entry = content.find(signature)
        while entry >= 0:
            content[entry + offset] |= 1
            entry = content.find(signature, entry + 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match="images cannot be read, over 1%.*encrypted"):
        data.load(DataConfig(source=str(path), image_size=16), "train")


def test_hidden_files_of_a_system_are_no_images(tmp_path):
    """A zip made on a Mac has a hidden companion for every file, beside it or in another folder."""
    paint(tmp_path / "one.png")
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for i in range(40):
            archive.write(tmp_path / "one.png", f"pics/{'ab'[i % 2]}/{i}.png")
            archive.writestr(f"__MACOSX/pics/{'ab'[i % 2]}/._{i}.png", b"shadow")
    with zipfile.ZipFile(tmp_path / "mac.zip") as archive:
        archive.extractall(tmp_path / "folder")
    paint(tmp_path / "folder" / "pics" / "a" / "._0.png")
    for source in (tmp_path / "mac.zip", tmp_path / "folder" / "pics"):
        splits = [
            open_source(DataConfig(source=str(source), image_size=16), split)
            for split in ("train", "val")
        ]
        assert splits[0].classes == ["a", "b"] and sum(map(len, splits)) == 40
