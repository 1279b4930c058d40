"""A cached run writes the same bytes as an uncached one; cache files that are damaged or belong to
another configuration are computed again.
"""

import errno
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import assert_same_run
from PIL import Image

from gear.config import Interrupted, TrainingStopped, UserError
from gear.data import DataConfig, Stream
from gear.data.stream import upload
from gear.experiments.recipes import recipe
from gear.training import cached
from gear.training.cached import Cached, Rows
from gear.training.loop import Runtime, train
from gear.training.state import State

CACHED = Runtime(device="cpu", quiet=True, cached=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cached, "FILE", 128)  # rows per file; `tiny` has 512


def paint(folder, size=(32, 32), count=40):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(path)
    return DataConfig(source=str(folder))


def state_of(**changes):
    return State(replace(recipe("tiny"), **changes), CPU)


def files(home):
    return {
        path: path.stat().st_mtime_ns for path in sorted((home / "cache" / "codes").rglob("*.npy"))
    }


@pytest.fixture
def built(tiny, home):
    """Compute the cache of `tiny`: four files of codes and four of features; returns {file:
    modification time}.
    """
    Cached(state_of(), quiet=True)
    built_files = files(home)
    assert len(built_files) == 8
    return built_files


def computed(monkeypatch):
    """Return a list to which the number of every file computed from now on is appended."""
    computed_files, write = [], Rows.write
    monkeypatch.setattr(
        Rows,
        "write",
        lambda rows, file, values: (computed_files.append(file), write(rows, file, values)),
    )
    return computed_files


def test_a_cached_run_has_the_bytes_of_an_uncached_one_and_looks_at_no_image(
    tiny, tiny_runs, built, monkeypatch
):
    def observe(state, images, labels, indices, target):
        assert images.numel() == 0
        return original_observe(state, images, labels, indices, target)

    original_observe = State.observe
    monkeypatch.setattr(State, "observe", observe)
    monkeypatch.setattr(Rows, "write", lambda *_: pytest.fail("computed again"))
    shutil.rmtree(tiny / "tiny")
    train(recipe("tiny"), "tiny", CACHED)
    assert_same_run(tiny / "tiny", tiny_runs / "tiny")
    train(
        replace(recipe("tiny"), seed=7), "other-seed", replace(CACHED, workers=2)
    )  # the same variants in another order


def test_one_process_computes_and_the_others_wait(tiny, home):
    lock = home / "cache" / "codes" / ".lock"
    lock.parent.mkdir(parents=True)
    thread = threading.Thread(target=lambda: Cached(state_of(), quiet=True))
    with FileLock(lock):
        thread.start()
        thread.join(1)
        assert thread.is_alive() and not files(home)
    thread.join(60)
    assert len(files(home)) == 8


def test_the_joint_stage_has_nothing_to_look_up(tiny, tiny_runs, home):
    shutil.rmtree(tiny / "tiny-joint")
    train(recipe("tiny-joint"), "tiny-joint", CACHED)
    assert_same_run(tiny / "tiny-joint", tiny_runs / "tiny-joint")
    assert not (home / "cache" / "codes").exists()


@pytest.mark.parametrize("size", [(32, 32), (40, 32)], ids=["square", "cropped"])
@pytest.mark.parametrize("flip", (True, False))
def test_crops_and_flips_are_those_of_the_stream(tiny, home, size, flip):
    state = state_of(data=replace(paint(home / "images", size), flip=flip), steps=9)
    samples, stream = Cached(state, quiet=True), Stream(state.config.data, 0)
    for first in (0, 16, 100):  # of 144
        numbers = list(range(first, first + 16))
        computed_batch, cached_batch = (
            state.observe(*upload(s.__getitems__(numbers), CPU)) for s in (stream, samples)
        )
        for name in ("labels", "indices", "target"):
            assert torch.equal(getattr(computed_batch, name), getattr(cached_batch, name)), name
    assert samples.length == (144 if size[0] > 32 else (1 + flip) * len(samples.source))
    assert (
        samples.arrays[0].stored_dtype == np.uint8 and samples.arrays[1].stored_dtype == np.float32
    )


def test_a_longer_run_of_the_same_crops_computes_what_is_to_come(tiny, home, monkeypatch):
    data = paint(home / "images", (40, 32))
    Cached(state_of(data=data, steps=18), quiet=True).__getitems__(
        [256, 287]
    )  # 288 samples; the file of the last ones is now mapped into memory
    computed_files = computed(monkeypatch)
    longer, stream = Cached(state_of(data=data, steps=24), quiet=True), Stream(data, 0)
    numbers = list(range(280, 296))
    expected = state_of(data=data).observe(*upload(stream.__getitems__(numbers), CPU))
    assert torch.equal(longer.__getitems__(numbers)[2], expected.indices)
    Cached(state_of(data=data, steps=10), quiet=True)
    assert computed_files == [2, 2]


def test_what_the_values_depend_on_makes_another_cache_and_says_so(
    tiny, built, home, capsys, monkeypatch
):
    state = state_of()
    with torch.no_grad():
        next(state.tokenizer.parameters()).flatten()[0] += 1e-3
    (home / "cache" / "codes" / "other").mkdir()
    (home / "cache" / "codes" / "other" / "about.json").write_text("{ cut")
    Cached(state, quiet=True)
    messages = capsys.readouterr().err.splitlines()
    assert (
        len(messages) == 1
        and "codes of 512 rows are computed into" in messages[0]
        and messages[0].endswith("were made with another network.")
    )
    monkeypatch.setattr("gear.training.cached.torch.get_num_threads", lambda: 2)
    Cached(state_of(batch_size=8), quiet=True)
    assert capsys.readouterr().err.count("were made with another batch_size, device.") == 2
    assert files(home).items() > built.items()


def test_changed_images_and_preprocessing_make_another_cache(tiny, home, capsys):
    data = paint(home / "images")
    Cached(state_of(data=data), quiet=True)
    name = next((home / "images" / "a").iterdir())
    Image.new("RGB", (32, 32)).save(name)
    for changed, field in (
        (data, "images"),
        (replace(data, flip=False), "flip"),
        (replace(data, interpolation="box"), "interpolation"),
    ):
        capsys.readouterr()
        samples, state = Cached(state_of(data=changed), quiet=True), state_of(data=changed)
        assert capsys.readouterr().err.count(f"were made with another {field}.") == 2
        expected = state.observe(*upload(Stream(changed, 0).__getitems__(list(range(48))), CPU))
        assert torch.equal(expected.indices, samples.__getitems__(list(range(48)))[2])


def damage(path, how):
    if how == "gone":
        path.unlink()
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if how == "empty":
        path.write_bytes(b"")
    if how == "a bit":
        content = path.read_bytes()
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 4]) + content[1001:])
    if how == "without its hash":
        path.write_bytes(path.read_bytes()[:-32])
    if how == "other":
        np.save(path, np.zeros((128, 3), np.float64))


@pytest.mark.parametrize("how", ("gone", "cut", "empty", "other", "a bit", "without its hash"))
def test_a_damaged_file_is_computed_again_and_no_other(tiny, built, home, how, monkeypatch, capsys):
    before, damaged = {p: p.read_bytes() for p in built}, list(built)[2]
    leftover = damaged.with_name(f".{damaged.name}.1.tmp")
    leftover.write_bytes(b"of a kill")
    damage(damaged, how)
    capsys.readouterr()
    computed_files = computed(monkeypatch)
    Cached(state_of(), quiet=True)
    assert (
        computed_files == [2]
        and {p: p.read_bytes() for p in files(home)} == before
        and not leftover.exists()
    )
    assert capsys.readouterr().err.count("files are missing, damaged or not computed yet.") == 1


def test_a_cache_folder_that_is_gone_is_made_again(tiny, built, home):
    shutil.rmtree(home / "cache")
    Cached(state_of(), quiet=True)
    assert files(home).keys() == built.keys()


def test_a_signal_stops_between_files_and_what_was_computed_stands(tiny, home, monkeypatch):
    signals, write = [], Rows.write
    monkeypatch.setattr(Rows, "write", lambda *a: (write(*a), signals.append(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="keeps what was computed. The same command goes on"):
        Cached(state_of(), quiet=True, signals=signals)
    assert len(files(home)) == 2
    computed_files = computed(monkeypatch)
    Cached(state_of(), quiet=True)
    assert len(computed_files) == 6


def test_a_cache_folder_that_cannot_be_written_to(tiny, home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("GEAR_CACHE", str(home / "file" / "cache"))
    with pytest.raises(
        UserError,
        match=r"nothing can be kept in .*file is a file, not a folder. Set \$GEAR_CACHE to",
    ):
        train(recipe("tiny"), "unwritable", CACHED)


def test_a_full_disk_stops_the_run_in_a_line_and_the_same_command_goes_on(
    tiny, tiny_runs, home, monkeypatch
):
    def full(file, values):
        if len(files(home)) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, values)

    save = np.save
    shutil.rmtree(tiny / "tiny")
    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingStopped, match="stopped at step 0: .*No space left.*Make room"),
    ):
        patch.setattr(np, "save", full)
        train(recipe("tiny"), "tiny", CACHED)
    assert len(files(home)) == 3 and not list((home / "cache").rglob("*.tmp"))
    train(recipe("tiny"), "tiny", CACHED)
    assert_same_run(tiny / "tiny", tiny_runs / "tiny")
