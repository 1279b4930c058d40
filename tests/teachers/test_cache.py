"""A stored feature equals the computed one bit for bit; a cache that cannot be used is reported,
and features are computed.
"""

import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gear.images import to_float
from gear.teachers import cache
from gear.teachers.cache import CHUNK, FeatureCache

WEIGHT = torch.linspace(-1, 1, 48 * 5).view(48, 5)


def images(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return to_float(torch.from_numpy(pixels))


class Counted:
    """Features of four patches of an 8 px image, by a matrix; `images` counts the computed images,
    with padding.
    """

    def __init__(self):
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        return torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2) @ WEIGHT


def cached(identity="net", compute=None):
    return FeatureCache(identity, 5, compute or Counted())


def rows(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute("SELECT count(*) FROM features").fetchone()[0]


def test_found_equals_computed_bit_for_bit_and_is_not_computed_again():
    x, first, second = images(11), cached(), cached()
    computed = first(x)
    assert computed.shape == (11, 4, 5) and computed.dtype == torch.float16
    torch.testing.assert_close(computed.float(), Counted()(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(second(x), computed) and second.compute.batches == []
    assert torch.equal(first(x), computed)


def test_only_what_is_missing_is_computed_in_chunks_of_one_size():
    """The batch size changes the last bits of a convolution, so it is always the same, with padding
    if need be.
    """
    one = cached()
    one(images(11))
    assert one.compute.batches == [CHUNK, CHUNK]
    mixed = torch.cat([images(11)[3:9], images(2, seed=1), images(1, seed=1)])
    features = one(mixed)
    assert one.compute.batches == [CHUNK, CHUNK, CHUNK]
    assert torch.equal(features[6], features[8]) and torch.equal(
        features, torch.cat([cached()(x[None]) for x in mixed])
    )


def test_the_key_is_the_content_and_what_computes():
    x = images(4)
    cached()(x)
    changed = x.clone()
    changed[2, 0, 0, 0] *= -1
    for identity, pictures, count in (
        ("net", x.flip(0), 0),
        ("net", changed, 1),
        ("other", x, 1),
        ("net", x.view(4, 3, 4, 16), 1),
    ):
        again = cached(identity)
        again(pictures)
        assert len(again.compute.batches) == count


def test_threads_are_part_of_the_key():
    """The number of threads changes the last bits of a feature, so a run looks up those of its own
    number.
    """
    cached()(images(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        again = cached()
        again(images(2))
        assert again.compute.batches == [CHUNK]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fault", ("garbage", "torn", "no folder", "full"))
def test_a_cache_that_cannot_be_used_is_said_once(fault, home, monkeypatch, capsys):
    x, path = images(300), home / "cache" / "features.sqlite"
    expected = cached()(x)
    gc.collect()  # close the file, because SQLite repairs one that still has its journal
    assert rows(path) == 300 and [p.name for p in path.parent.iterdir()] == [path.name]
    if fault == "garbage":
        path.write_bytes(b"this is no database " * 100)
    elif fault == "torn":  # the pages of the table are lost, the header is intact
        path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 40_000)
    elif fault == "no folder":
        monkeypatch.setenv("GEAR_CACHE", str(path))
    else:
        monkeypatch.setattr(cache, "LIMIT", path.stat().st_size)
        x = torch.cat([x, images(900)[300:]])  # more images than the file has room for
        expected = cached()(x)
        capsys.readouterr()
    broken = cached()
    for chunk in (x, x[:20], x):
        assert torch.equal(broken(chunk), expected[: len(chunk)])
    message = capsys.readouterr().err
    assert (
        message.count("cannot be used") == 1
        and "Delete it" in message
        and str(home / "cache") in message
    )
    if fault == "full":  # stored features are still looked up
        broken.compute.batches.clear()
        assert torch.equal(broken(x[:300]), expected[:300]) and not broken.compute.batches


@pytest.mark.parametrize(
    "damage",
    (
        lambda value: value[:-2],
        lambda value: value[:-16],
        lambda value: value + bytes(2),
        lambda value: value[:7] + bytes([value[7] ^ 1]) + value[8:],
        lambda value: b"",
        lambda value: None,
        lambda value: "text",
        lambda value: 7,
    ),
)
def test_a_row_that_was_cut_or_changed_is_computed_again(damage, home, capsys):
    x = images(11)
    expected = cached()(x)
    with (
        contextlib.closing(sqlite3.connect(home / "cache" / "features.sqlite")) as database,
        database,
    ):
        ((key, value),) = database.execute("SELECT key, value FROM features LIMIT 1").fetchall()
        database.execute("UPDATE features SET value = ? WHERE key = ?", (damage(value), key))
    again, after = cached(), cached()
    assert torch.equal(again(x), expected) and again.compute.batches == [CHUNK]
    assert (
        torch.equal(after(x), expected)
        and after.compute.batches == []
        and not capsys.readouterr().err
    )


PROCESS = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from test_cache import cached, images
import torch
torch.set_num_threads(1)
for round in range(int(sys.argv[2])):
    print(hash(cached()(images(40, seed=round)).numpy().tobytes()), flush=True)
"""


def fill(rounds):
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [
        sys.executable,
        "-c",
        PROCESS,
        f"{os.path.dirname(__file__)}:{os.path.dirname(os.path.dirname(__file__))}",
        str(rounds),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_share_the_file(home):
    (one, message), (other, also) = (process.communicate() for process in [fill(8), fill(8)])
    assert one == other and len(one.splitlines()) == 8 and message == also == ""
    assert rows(home / "cache" / "features.sqlite") == 8 * 40


def test_the_file_survives_kill_9(home, capsys):
    process = fill(100_000)
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = rows(home / "cache" / "features.sqlite")
    assert left >= 3 * 40 and left % 40 == 0  # a batch is stored as a whole, or not at all
    again = cached()
    assert (
        torch.equal(again(images(40, seed=2)), cached("fresh")(images(40, seed=2)))
        and again.compute.batches == []
    )
    assert "cannot be used" not in capsys.readouterr().err
