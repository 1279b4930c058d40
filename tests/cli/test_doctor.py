"""`gear doctor` says what works, agrees with what the code does, and fetches nothing."""

import importlib
import os
import socket
import sys
import types

import pytest
import torch

from gear.__main__ import main
from gear.cli import doctor, health
from gear.config import UserError
from gear.evaluation.lpips import lpips_backbone
from gear.evaluation.networks import INCEPTION, NETWORKS, load_network_by_name
from gear.runs.folder import runs_dir
from gear.teachers import TEACHERS, check_installed, scenes
from gear.teachers.networks import VITS

STATES = {"ok", "note", "missing", "broken"}


@pytest.fixture(autouse=True)
def isolated(home, monkeypatch):
    """Torch's cache is the test's own, and any use of the network fails."""
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    refuse = lambda *arguments, **options: pytest.fail("gear doctor used the network")  # noqa: E731
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def rows_of(title, report=None):
    return {name: (state, note) for name, state, note in (report or doctor.examine())[title]}


def test_the_report_is_a_table_of_known_states(capsys, monkeypatch):
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: report)  # free space changes between two calls
    main(["doctor"])
    lines = capsys.readouterr().out.split("\n")
    assert list(report) == ["Python and packages", "Device", "Weights", "Folders"]
    rows = [row for part in report.values() for row in part]
    assert {state for _, state, _ in rows} <= STATES - {"broken"}
    listed = [line for line in lines if line.startswith("  ")]
    assert len(listed) == len(rows) and [line.split()[0] for line in listed] == [r[1] for r in rows]
    column = listed[0].index(rows[0][2])
    assert all(line[column:] == note for line, (_, _, note) in zip(listed, rows))  # aligned
    assert lines[-2] == "Nothing that is required is broken."


def test_something_required_that_is_broken_gives_code_1(monkeypatch, capsys, home):
    monkeypatch.setattr(scenes, "PACKAGED", home / "nowhere.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "Broken, and required: scenes teacher." in out
    assert f"({home / 'nowhere.safetensors'})" in out and "make teacher" in out


@pytest.mark.parametrize("words", (["all"], ["--foo"]))
def test_doctor_takes_no_words(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *words])
    assert stop.value.code == 2 and "neither names nor options" in capsys.readouterr().err


# -- packages --------------------------------------------------------------------------------------


def test_packages_are_those_that_the_project_declares():
    python, pairs = doctor.requirements()
    names = {name for name, _, _ in doctor.package_rows(python, pairs)}
    assert {"python", "torch", "torchvision", "lpips", "papermill", "torch-fidelity"} <= names
    assert {"lightning-fabric", "timm", "transformers"} <= names
    assert ("torchvision", "") in pairs and {group for _, group in pairs} == {"", *doctor.USES}


def test_packages_of_an_installed_package_without_its_project_file(home, monkeypatch):
    monkeypatch.setattr(doctor, "PROJECT", home / "pyproject.toml")
    lines = ["torch<2.14,>=2.11", "timm>=1.0.20; extra == 'teachers'"]
    metadata = types.SimpleNamespace(get_all=lambda key: lines, __getitem__=None)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: Metadata(metadata))
    assert doctor.requirements() == (
        ">=3.11",
        [("torch<2.14,>=2.11", ""), ("timm>=1.0.20", "teachers")],
    )

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", none)
    assert doctor.requirements() == ("", [])
    assert [row[:2] for row in doctor.package_rows("", [])] == [("python", "ok")]


class Metadata:
    """The metadata of a distribution, as far as they are read."""

    def __init__(self, lines):
        self.get_all = lines.get_all

    def __getitem__(self, key):
        return {"Requires-Python": ">=3.11"}[key]


def test_a_package_is_missing_too_old_or_required():
    pairs = [("nonexistent-a>=2", ""), ("nonexistent-b", "scale"), ("numpy>=99", ""),
             ("numpy<99", "x"), ("tyro>=99", "dev"), ("tqdm", "")]  # fmt: skip
    rows = {name: (state, note) for name, state, note in doctor.package_rows(">=99", pairs)}
    assert rows["python"][0] == "broken"
    assert rows["nonexistent-a"] == ("broken", "required: pip install 'nonexistent-a>=2'")
    assert rows["nonexistent-b"][0] == "missing" and "TensorBoard" in rows["nonexistent-b"][1]
    assert rows["numpy"][0] == "broken" and "needs >=99,<99" in rows["numpy"][1]  # of both groups
    assert rows["tyro"][0] == "missing" and "pip install 'tyro>=99'" in rows["tyro"][1]
    assert rows["tqdm"][0] == "ok"


def test_a_version_is_compared_with_a_range():
    assert doctor.fits("2.13.0+cpu", ">=2.11,<2.14") and doctor.fits("2.11", "<2.14,>=2.11")
    assert not doctor.fits("2.14.0", ">=2.11,<2.14") and not doctor.fits("2.9.1", ">=2.11")
    assert doctor.fits("1.0", "==1.0.0") and doctor.fits("anything", "")


def test_a_library_that_does_not_import(monkeypatch, capsys):
    """Doctor itself then ends with a report, though nothing of gear that needs torch loads."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    rows = rows_of("Python and packages")
    assert rows["torchvision"][0] == "broken" and "cannot be imported" in rows["torchvision"][1]
    monkeypatch.setitem(sys.modules, "gear.cli.health", None)
    report = doctor.examine()
    assert list(report) == ["Python and packages", "gear"] and report["gear"][0][1] == "broken"
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1 and "gear" in capsys.readouterr().out


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_says_why():
    rows = rows_of("Device")
    assert rows["GPU"][0] == "note" and rows["torch.compile"][0] == "note"
    assert f"torch uses {torch.get_num_threads()} threads" in rows["CPU"][1]
    assert torch.__version__ in rows["torch"][1]
    if torch.version.cuda is None:
        assert "built for CPUs" in rows["GPU"][1]


def test_a_driver_that_is_missing_is_the_reason(monkeypatch):
    def fail():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nmore")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert health.why_no_gpu() == (
        "Found no NVIDIA driver on your system (CUDA_VISIBLE_DEVICES='7')"
    )


def gpus(monkeypatch, has_bf16):
    """Let torch report two GPUs, whose tensors lie on the CPU."""
    properties = types.SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(health, "open_device", lambda name: torch.device("cpu"))


def test_a_gpu_has_rows_of_its_own(monkeypatch):
    gpus(monkeypatch, has_bf16=False)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows = {name: (state, note) for name, state, note in health.device_rows()}
    assert rows["cuda:1"] == ("ok", "H100, 80 GiB, compute capability 9.0")
    assert rows["cuda:0 bf16"] == ("missing", "use --precision float32")
    assert rows["cuda:0 compile"] == ("ok", "torch.compile works")
    gpus(monkeypatch, has_bf16=True)

    def fail(function):
        raise RuntimeError("no C compiler. Install one")

    monkeypatch.setattr(torch, "compile", fail)
    rows = {name: (state, note) for name, state, note in health.device_rows()}
    assert rows["cuda:1 bf16"][0] == "ok" and rows["cuda:0 compile"][0] == "missing"
    assert "RuntimeError, no C compiler; --eager" in rows["cuda:0 compile"][1]


def test_a_gpu_that_cannot_be_had_is_missing_and_not_broken(monkeypatch):
    gpus(monkeypatch, has_bf16=True)

    def fail(name):
        raise UserError(f"device '{name}' cannot be used (busy): wait for it, or take cpu.")

    monkeypatch.setattr(health, "open_device", fail)
    assert [row[:2] for row in health.device_rows()[2:]] == [
        ("cuda:0", "missing"),
        ("cuda:1", "missing"),
    ]


def test_a_compiled_function_that_gives_a_wrong_number_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: function(x) + 1)
    assert health.compile_fault(torch.device("cpu")) == "wrong result 193.0, not 192"


@pytest.mark.slow
def test_compiling_is_tried_for_real():
    assert health.compile_fault(torch.device("cpu")) == ""


# -- weights ---------------------------------------------------------------------------------------


def test_every_teacher_and_network_has_a_row_that_agrees_with_what_loads_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = {name: state for name, state, _ in health.weight_rows()}
    assert rows.pop("$HF_HUB_OFFLINE") == "note"
    bare = {name.partition(",")[0].removesuffix(" teacher") for name in rows}
    assert set(TEACHERS) <= bare
    assert {name.lower() for name in NETWORKS} <= {name.lower() for name in bare}
    for name in ("scenes", "efficientnet-lite0", "clip-l"):  # of one input size each
        row = "scenes teacher" if name == "scenes" else name
        assert (rows[row] == "ok") == succeeds(lambda name=name: check_installed(name))
    assert (rows["Inception"] == "ok") == succeeds(lambda: load_network_by_name("inception"))


def succeeds(function):
    try:
        function()
    except UserError:
        return False
    return True


def test_missing_weights_name_what_provides_them():
    rows = rows_of("Weights")
    assert rows["Inception"][0] == "missing" and "--weights FILE" in rows["Inception"][1]
    assert rows["LPIPS (VGG16)"][0] == "missing"
    assert "torchvision.models.vgg16" in rows["LPIPS (VGG16)"][1]
    assert str(lpips_backbone()) in rows["LPIPS (VGG16)"][1]
    state, note = rows["vjepa2.1-b"]
    assert state == "missing" and "--teacher vjepa2.1-b=FILE" in note and "1664 MB" in note


def test_weights_in_a_cache_are_found_where_they_are(home):
    cache = home / "cache"
    cache.mkdir()
    (cache / VITS["vjepa2.1-b"].file).write_bytes(b"weights")
    assert rows_of("Weights")["vjepa2.1-b"] == ("ok", str(cache / VITS["vjepa2.1-b"].file))


def test_damaged_weights_are_said_to_be_so_and_not_to_be_missing(home):
    (home / "cache").mkdir()
    (home / "cache" / INCEPTION).write_bytes(b"cut short")
    lpips_backbone().parent.mkdir(parents=True)
    lpips_backbone().write_bytes(b"cut short")
    rows = rows_of("Weights")
    for name, path in (
        ("Inception", home / "cache" / INCEPTION),
        ("LPIPS (VGG16)", lpips_backbone()),
    ):
        state, note = rows[name]
        assert state == "missing" and f"{path} is damaged" in note


def test_a_network_whose_package_is_missing_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    state, note = rows_of("Weights")["efficientnet-lite0"]
    assert state == "missing" and "pip install timm" in note


# -- folders ---------------------------------------------------------------------------------------


def test_folders_have_sizes_and_runs_are_counted(tiny, home):
    rows = rows_of("Folders")
    (home / "cache").mkdir()
    (home / "cache" / "large").write_bytes(bytes(2_500_000))
    assert rows["runs"] == ("ok", "3 (gear runs lists them)")
    assert rows["records"][1].startswith("0, without weights")
    assert f"{home / 'figures'}, made at first use" in rows["$GEAR_FIGURES"][1]
    state, note = rows_of("Folders")["$GEAR_CACHE"]
    assert state == "ok" and f"{home / 'cache'}, 2.5 MB, " in note and "free, writable" in note
    assert not (home / "figures").exists()  # nothing is made


def test_records_are_counted_apart_from_runs(tiny, home):
    main(["pack", str(runs_dir() / "reference"), "tiny*"])
    rows = rows_of("Folders")
    assert rows["runs"][1].startswith("3 ") and rows["records"][1].startswith("3, without weights")
    (runs_dir() / "reference" / "runs.csv").write_text("no table of runs")
    state, note = rows_of("Folders")["records"]
    assert state == "broken" and "runs.csv cannot be read" in note


def test_a_folder_that_cannot_be_written_to_is_broken(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("GEAR_RUNS", str(home / "file" / "below"))
    state, note = rows_of("Folders")["$GEAR_RUNS"]
    assert state == "broken" and "is a file, not a folder. Set $GEAR_RUNS" in note
    assert os.listdir(home) == ["file"]
