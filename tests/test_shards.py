"""Tar shards are a source like a folder: split by name, sample n a function of (seed, n); a bad shard says what is wrong."""

import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import assert_same_run
from PIL import Image

from gear import data, shards
from gear.config import UserError
from gear.data import DataConfig, open_source
from gear.recipes import recipe
from gear.run import Run
from gear.training.loop import Runtime, train

pytest.importorskip("wids.wids", reason="pip install 'webdataset<1'")
SHARDS, SAMPLES = 10, 9


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(number):
    out = io.BytesIO()
    Image.fromarray(pixels(number)).save(out, "PNG")
    return out.getvalue()


def write_shard(path, samples):
    """Write {file name: bytes} as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def sample(number, label=None):
    """The files of a sample: its image, and its class as `label` says, by number % 3 unless told."""
    kinds = {"cls": (".cls", str(number % 3).encode()), "json": (".json", json.dumps({"label": number % 3}).encode())}
    extension, content = kinds.get(label, (None, None))
    return {f"{number:03d}.png": encoded(number)} | ({f"{number:03d}{extension}": content} if extension else {})


def write_shards(folder, label="cls"):
    for s in range(SHARDS):
        files = [sample(s * SAMPLES + i, label) for i in range(SAMPLES)]
        write_shard(folder / f"train-{s:06d}.tar", {k: v for part in files for k, v in part.items()})
    return DataConfig(source=str(folder), image_size=16, flip=False)


@pytest.fixture
def config(tmp_path):
    return write_shards(tmp_path / "shards")


def number(name):
    return int(name.replace(":", "/").split("/")[-1])


@pytest.mark.parametrize("label", ("cls", "json"))
def test_images_and_labels_are_those_of_the_shards_and_splits_are_disjoint(tmp_path, label):
    config = write_shards(tmp_path / label, label)
    train, val = open_source(config, "train"), open_source(config, "val")
    assert sorted(number(n) for n in train.names + val.names) == list(range(90)) and 1 <= len(val) <= 12
    assert train.classes == ["00000", "00001", "00002"] and data.num_classes(config) == 3
    for position, name in enumerate(train.names):
        np.testing.assert_array_equal(train.images([position])[0], pixels(number(name)))
        assert train.labels(position) == number(name) % 3


def test_shards_without_labels_are_one_class(tmp_path):
    assert open_source(write_shards(tmp_path / "bare", None), "train").classes == ["bare"]


def test_a_list_of_shards_is_the_folder_of_them(config):
    spec = replace(config, source=f"{config.source}/train-{{000000..000009}}.tar")
    one, other = (open_source(c, "train") for c in (config, spec))
    assert one.names == other.names and one.identity() == other.identity()


def taken(config, total, batch_size, start=0, workers=0):
    batches = islice(data.stream(config, 3, batch_size, start, workers), total // batch_size)
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stream_from_sample_n_is_the_tail_of_the_stream(config, workers):
    config = replace(config, flip=True)
    images, labels = taken(config, 200, 8)
    for start, batch_size in ((24, 8), (100, 4), (7, 1)):
        tail, tail_labels = taken(config, 24, batch_size, start, workers)
        assert torch.equal(tail, images[start : start + 24]) and torch.equal(tail_labels, labels[start : start + 24])


def test_an_epoch_shows_every_image_once_and_reads_a_few_shards_at_a_time(config, monkeypatch):
    monkeypatch.setattr(shards, "GROUP", 2)
    source = open_source(config, "train")
    orders = [source.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(len(source))) and list(orders[0]) == list(orders[1]) != list(orders[2])
    shard = [number(source.names[p]) // SAMPLES for p in orders[0]]
    changes = sum(a != b for a, b in zip(shard, shard[1:]))
    assert len(set(shard[:14])) == 2 and changes > 2 * SHARDS  # two shards at a time, mixed


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
        replace(recipe("tiny"), data=config, steps=6, eval_images=4, generator=replace(recipe("tiny").generator, num_classes=3))
    ] * 2
    for name, cached, c in zip(("plain", "cached"), (False, True), runs):
        train(c, name, Runtime(device="cpu", quiet=True, cached=cached))
    assert_same_run(tiny / "plain", tiny / "cached")


def test_what_was_read_of_a_shard_is_kept_until_it_changes(config, home, monkeypatch):
    open_source(config, "train")
    shards._listed.cache_clear()
    opened, open_shard = [], shards._open
    monkeypatch.setattr(shards, "_open", lambda path: (opened.append(path.name), open_shard(path))[1])
    assert len(open_source(config, "all")) == 90 and not opened
    changed = write_shard(home / "shards" / "train-000003.tar", sample(500, "cls"))
    assert len(open_source(config, "all")) == 82 and opened == [changed.name]


# -- bad shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", (1024, 700, 5000, 0, -1024))
def test_a_cut_shard_is_named(config, home, keep):
    path = home / "shards" / "train-000004.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    path.write_bytes(content[:keep] if keep >= 0 else content[: end - 100])
    with pytest.raises(UserError, match=r"the shard .*train-000004.tar is cut short, or is no plain tar.*write it again"):
        open_source(config, "train")


def test_a_shard_of_garbage_is_named(config, home):
    (home / "shards" / "train-000004.tar").write_bytes(b"\xff" * 2048 + bytes(1024))
    with pytest.raises(UserError, match=r"the shard .*train-000004.tar cannot be read"):
        open_source(config, "train")


def test_samples_without_label_or_image_are_named(config, home):
    extra = home / "shards" / "train-000010.tar"
    for files, message in (
        (sample(90), "sample '090' has no label, others have. Add 090.cls"),
        ({"091.txt": b"a"}, "sample '091' has no image"),
        (sample(92) | {"092.cls": b"cat"}, "label of sample '092' is no number"),
        (sample(93) | {"093.json": b'{"label": "cat"}'}, "label of sample '093' is no number"),
        (sample(94) | {"094.json": b"[3]"}, "label of sample '094' is no number"),
    ):
        write_shard(extra, files)
        with pytest.raises(UserError, match=f"train-000010.tar: .*{message}"):
            open_source(config, "train")


def test_missing_shards_and_names_used_twice(config, home):
    with pytest.raises(UserError, match=r"2 of 12 shards of .* are not there \(.*000010.tar, .*000011.tar\): give --source"):
        open_source(replace(config, source=f"{config.source}/train-{{000000..000011}}.tar"), "train")
    shutil.copytree(home / "shards", home / "again")
    with pytest.raises(UserError, match="share a file name"):
        open_source(replace(config, source=f"{home}/{{shards,again}}/train-000000.tar"), "train")


@pytest.mark.parametrize("module", ("wids.wids", "braceexpand"))
def test_without_the_library_the_message_says_how_to_install_it(config, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"tar shards need {module.split('.')[0]}: pip install 'webdataset<1'"):
        open_source(config, "train")


def test_a_folder_of_images_with_a_tar_beside_them_stays_a_folder(tmp_path):
    for i in range(9):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    write_shard(tmp_path / "images" / "backup.tar", sample(0))
    assert open_source(DataConfig(source=str(tmp_path / "images"), image_size=16), "all").classes == ["a", "b"]


def test_an_unreadable_image_of_a_shard_has_a_stand_in(config, home, monkeypatch, capsys):
    monkeypatch.setattr("gear.folders.UNREADABLE_SHARE", 0.1)
    write_shard(home / "shards" / "train-000000.tar", {"000.png": b"no image", "000.cls": b"0"})
    assert len(data.load(config, "all")[0]) == 82 and "000 cannot be read (not an image)" in capsys.readouterr().err
