"""Any file may be damaged or of another kind: a command reads it, or reports what is wrong in one
message.
"""

import contextlib
import copy
import io
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import gear
from gear.__main__ import main
from gear.config import UserError
from gear.evaluation.clip import read_captions
from gear.evaluation.evaluate import report
from gear.evaluation.sources import npz_images, reference
from gear.public.layouts import LAYOUTS
from gear.runs.run import Run, load_runs

pytestmark = pytest.mark.slow
CASES = dict(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    1.5,
    "",
    "x",
    "\ud800",
    "12",
    [],
    {},
    [1, "a"],
    {"a": []},
]


def run_command(*arguments):
    """Run a command, which succeeds or ends with one message, whatever a file holds."""
    return ends_well(lambda: main(list(arguments)))


def ends_well(call):
    """Call a function or a command of gear's; returns 0 if it succeeds, and 2 if it reports what is
    wrong. A traceback fails the test.
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            call()
            code = 0
        except SystemExit as stop:
            code = stop.code
        except UserError as error:
            code = 2 if str(error) else 1
    printed.getvalue().encode()  # a terminal can print it
    assert code in (0, 2), errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    return code


@st.composite
def damaged(draw, contents):
    """Draw one of `contents`, bytes, that is cut, changed, spliced with another, or preceded by
    other bytes.
    """
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 3))):
        near = st.one_of(
            st.integers(0, 600),
            st.integers(max(0, len(content) - 600), len(content)),
            st.integers(0, len(content)),
        )
        at = min(draw(near), len(content))
        how = draw(st.sampled_from(["cut", "flip", "set", "insert", "delete", "splice", "before"]))
        if how == "cut":
            del content[at:]
        elif how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            content[at : at + len(new)] = new
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "delete":
            del content[at : at + draw(st.integers(1, 64))]
        elif how == "splice":
            other = draw(st.sampled_from(contents))
            content[at:] = other[min(draw(near), len(other)) :]
        else:
            content[:0] = draw(
                st.sampled_from(
                    [
                        b"\xef\xbb\xbf",
                        b"\xff\xfe",
                        b"<html>",
                        b"version https://git-lfs",
                        b"\0",
                        b"\n",
                    ]
                )
            )
    return bytes(content)


@st.composite
def altered(draw, values):
    """Draw JSON in which a value is removed or replaced by one of another kind, or whose bytes are
    damaged.
    """
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        container = values
        while isinstance(container, (dict, list)) and container:
            key = draw(
                st.sampled_from(
                    sorted(container) if isinstance(container, dict) else range(len(container))
                )
            )
            inner = container[key]
            if not (isinstance(inner, (dict, list)) and inner) or draw(st.integers(0, 3)) == 0:
                if draw(st.integers(0, 4)) == 0:
                    del container[key]
                else:
                    container[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
                break
            container = inner
    return values


def either(values, lines=False):
    """Draw JSON text, altered or damaged."""
    text = lambda v: "".join(json.dumps(line) + "\n" for line in v) if lines else json.dumps(v)
    plain = text(values).encode()
    encoded = altered(values).map(lambda v: text(v).encode())
    others = [
        plain,
        plain.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + plain,
        b"[" * 100_000,
        b"null",
        b"7",
        b'"a"',
        b"[[]]",
        b"",
    ]
    return st.one_of(encoded, damaged([plain]), st.sampled_from(others))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return the bytes of a small tokenizer under its public names, in each kind of file."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoints"), tiny_tokenizer()
    layout = next(layout for layout in LAYOUTS if layout.name == "LlamaGen VQ")
    names = layout.public(tokenizer)
    tensors = {names[n]: t.detach().clone() for n, t in tokenizer.state_dict().items()}
    torch.save({"model": tensors, "ema": tensors, "steps": 3}, folder / "a.pt")
    torch.save(
        {"state_dict": {f"model.{n}": t for n, t in tensors.items()}},
        folder / "b.pt",
        _use_new_zipfile_serialization=False,
    )
    save_file(tensors, folder / "c.safetensors")
    main(["export", str(folder / "a.pt"), str(folder / "d.safetensors")])
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_checkpoints(checkpoints, home):
    ends = []

    @settings(max_examples=500, **CASES)
    @given(damaged(checkpoints), st.sampled_from([".pt", ".safetensors"]))
    def inspect(content, suffix):
        path = home / f"file{suffix}"
        path.write_bytes(content)
        ends.append(run_command("inspect", str(path)))
        with contextlib.suppress(UserError):
            gear.load_tokenizer(path)

    inspect()
    assert ends.count(2) > 200 and ends.count(0) > 20


class Mean:
    """A feature network with one number per image."""

    name, protocol = "mean", {}

    def __call__(self, images):
        return {"pool": images.float().mean((1, 2)).repeat(1, 2)}


def test_samples_and_references(home):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    contents = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, arr_0=images, mu=np.zeros(4), sigma=np.eye(4))
        contents.append(file.getvalue())

    @settings(max_examples=500, **CASES)
    @given(damaged(contents))
    def check_content(content):
        (home / "x.npz").write_bytes(content)
        ends_well(lambda: list(npz_images(home / "x.npz")))
        ends_well(lambda: reference(home / "x.npz", Mean(), 8))

    check_content()


def test_evaluate_on_damaged_samples(home, tiny):
    file = io.BytesIO()
    np.savez(file, arr_0=np.zeros((8, 32, 32, 3), np.uint8))

    @settings(max_examples=500, **CASES)
    @given(damaged([file.getvalue()]))
    def evaluate(content):
        (home / "x.npz").write_bytes(content)
        options = [
            "--metrics",
            "fd_scenes",
            "--network",
            "scenes",
            "--reference",
            str(home / "x.npz"),
            "--quiet",
        ]
        run_command("evaluate", "tiny", "--samples", str(home / "x.npz"), *options)

    evaluate()


def test_captions(home, tiny):
    captions = "a cat\nein Bär\n猫\r\nun café\u2028à Paris\n"
    contents = [
        captions.encode(encoding)
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")
    ]
    contents.append(captions[:13].encode("latin-1"))

    @settings(max_examples=500, **CASES)
    @given(
        st.one_of(
            damaged(contents),
            st.text().map(lambda text: text.encode(errors="replace")),
            st.binary(),
        )
    )
    def check_content(content):
        path = home / "captions.txt"
        path.write_bytes(content)
        ends_well(lambda: read_captions(path))
        run_command(
            "evaluate",
            "tiny",
            "--count",
            "3",
            "--captions",
            str(path),
            "--clip",
            str(home),
            "--quiet",
        )

    check_content()


@pytest.fixture
def run(tiny):
    """The run tiny with its scores, alone in the folder of runs."""
    shutil.rmtree(tiny / "tiny-joint")
    shutil.rmtree(tiny / "tiny-tokenizer")
    protocol = {"network": "scenes", "step": 24, "count": 8, "cfg_scale": 1.0}
    records = [
        {"metric": m, "value": 1.5, "interval": [1, 2], "protocol": protocol}
        for m in ("fd_scenes", "precision")
    ]
    (tiny / "tiny" / "metrics.json").write_text(json.dumps(records))
    return tiny / "tiny"


@pytest.mark.parametrize("file", ("config.json", "metrics.json", "metrics.jsonl", "state.json"))
def test_the_files_of_a_run(file, run):
    path = run / file if file != "state.json" else sorted(run.glob("checkpoints/*/state.json"))[-1]
    lines = path.read_text().splitlines()
    values = (
        [json.loads(line) for line in lines]
        if file == "metrics.jsonl"
        else json.loads(path.read_text())
    )

    @settings(max_examples=500, **CASES)
    @given(either(values, file == "metrics.jsonl"))
    def look(content):
        path.write_bytes(content)
        run_command("runs")
        ends_well(load_runs)
        ends_well(lambda: report([Run.open("tiny")]))
        ends_well(lambda: Run.open("tiny").load_state())
        if file == "config.json":
            run_command("inspect", "tiny")

    look()


@pytest.mark.parametrize("file", ("config.json", "metrics.json", "metrics.jsonl"))
def test_evaluate_on_a_damaged_run(file, run):
    """The command that computes scores gives the same; there are fewer cases, because each may
    compute.
    """
    path = run / file
    lines = path.read_text().splitlines()
    values = (
        [json.loads(line) for line in lines]
        if file == "metrics.jsonl"
        else json.loads(path.read_text())
    )

    @settings(max_examples=40, **CASES)
    @given(either(values, file == "metrics.jsonl"))
    def evaluate(content):
        path.write_bytes(content)
        run_command(
            "evaluate",
            "tiny",
            "--count",
            "4",
            "--reference-count",
            "8",
            "--network",
            "scenes",
            "--metrics",
            "fd_scenes",
            "--quiet",
        )

    evaluate()
