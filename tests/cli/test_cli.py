"""A user's mistake ends with one message that says what was wrong and what to do, and exit code 2.
No file is lost or changed.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gear
from gear.__main__ import main
from gear.data import DataConfig
from gear.experiments.recipes import TINY
from gear.teachers import scenes
from gear.training.loop import Runtime, train


def mistake(capsys, *arguments, code=2):
    """Run a command that must fail with an exit code and without a traceback; return its output."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert stop.value.code == code and "Traceback" not in output.err
    return output.err + output.out


def fingerprint(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def picture(path, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), np.uint8)
    ).save(path)


def test_unknown_command(capsys):
    assert "Did you mean 'train'?" in mistake(capsys, "trian", "tiny")


def test_unknown_recipe(capsys, home):
    assert "unknown recipe 'scenes-gaer'. Did you mean 'scenes-gear'?" in mistake(
        capsys, "train", "scenes-gaer-s0"
    )
    assert not (home / "runs").exists()


def test_unknown_override_suggests_the_nearest(capsys, home):
    assert "--tau" in mistake(capsys, "train", "tiny", "--tua", "0.1")
    assert not (home / "runs").exists()


def test_missing_folder(capsys, home):
    message = mistake(capsys, "train", "tiny-tokenizer", "--source", home / "nowhere")
    assert f"there are no images at '{home / 'nowhere'}'" in message
    assert not (home / "runs").exists()


def test_empty_folder(capsys, home):
    (home / "images").mkdir()
    assert "holds no images" in mistake(
        capsys, "train", "tiny-tokenizer", "--source", home / "images"
    )
    assert not (home / "runs").exists()


def test_a_damaged_zip_and_a_zip_without_images(capsys, home):
    (home / "a.zip").write_bytes(b"no zip at all")
    assert "a.zip' is not a zip" in mistake(
        capsys, "train", "tiny-tokenizer", "--source", home / "a.zip"
    )
    with zipfile.ZipFile(home / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert "b.zip' holds no images" in mistake(
        capsys, "train", "tiny-tokenizer", "--source", home / "b.zip"
    )
    assert not (home / "runs").exists()


def test_images_that_cannot_be_read(capsys, home):
    for i in range(30):
        picture(home / "pets" / "cat" / f"{i}.png")
        (home / "pets" / "cat" / f"{i}.png").write_bytes(b"no image")
    message = mistake(capsys, "train", "tiny-tokenizer", "--source", home / "pets")
    assert "images cannot be read, over 1%" in message and "Remove or replace them" in message
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "gpu"], "no device 'gpu' here: there is auto, cpu"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--steps", 0], "steps is 0: it has to be at least 1"),
        (["--batch-size", -1], "batch_size is -1: it has to be at least 1"),
        (["--workers", -1], "workers is -1: it has to be at least 0"),
        (["--name", "some/where"], "'some/where' is a path; a run is opened by name"),
    ],
)
def test_options_out_of_their_range(options, message, capsys, home):
    assert message in mistake(capsys, "train", "tiny-tokenizer", *options)
    assert not (home / "runs").exists()


def test_zero_jobs(capsys, home):
    assert "jobs is 0: it has to be at least 1" in mistake(
        capsys, "train", "tiny-tokenizer", "tiny", "--jobs", 0
    )
    assert not (home / "runs").exists()


@pytest.mark.parametrize("below", ("", "deeper/still"))
@pytest.mark.parametrize(
    "variable, command",
    [
        ("GEAR_RUNS", ["train", "tiny"]),
        ("GEAR_RUNS", ["train", "tiny", "tiny-joint", "--jobs", 2]),
        ("GEAR_FIGURES", ["figures", "fig4"]),
        ("GEAR_FIGURES", ["claims"]),
    ],
)
def test_a_folder_that_cannot_be_written_to(variable, command, below, capsys, home, monkeypatch):
    (home / "file").write_text("not a folder")
    monkeypatch.setenv(variable, str(home / "file" / below))
    before = fingerprint(home)
    message = mistake(capsys, *command)
    assert (
        f"{home / 'file'} is a file, not a folder. Set ${variable} to a folder of your own."
        in message
    )
    assert fingerprint(home) == before


def test_a_folder_without_the_right_to_write(capsys, home, monkeypatch):
    """Root may write everywhere, so the answer of the operating system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = mistake(capsys, "train", "tiny-tokenizer", "--quiet")
    assert (
        f"nothing can be kept in {home / 'runs'}" in message
        and "cannot be written to. Set $GEAR_RUNS" in message
    )
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    "spoil", (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:2000]))
)
def test_the_packaged_teacher_missing_or_truncated(spoil, capsys, tiny, monkeypatch):
    shutil.rmtree(tiny / "tiny-joint")
    packed = tiny.parent / "scenes.safetensors"
    shutil.copy(scenes.PACKAGED, packed)
    monkeypatch.setattr(scenes, "PACKAGED", packed)
    spoil(packed)
    before = fingerprint(tiny)
    message = mistake(capsys, "train", "tiny-joint", "--quiet")
    assert (
        "packaged scenes teacher" in message
        and str(packed) in message
        and "make teacher" in message
    )
    assert fingerprint(tiny) == before


def test_image_size_not_divisible(capsys, home):
    message = mistake(capsys, "train", "tiny-tokenizer", "--image-size", 30)
    assert "30 x 30 is not divisible by the tokenizer's downsampling 4" in message
    assert not (home / "runs").exists()  # a later, correct command would meet its configuration


def test_a_teacher_grid_that_differs_from_the_token_grid(capsys, home):
    message = mistake(capsys, "train", "tiny", "--channel-mult", 1, 2, "--label", "coarse")
    assert "8 x 8 patches" in message and "16 x 16 tokens" in message
    assert not (home / "runs" / "tiny-joint-coarse").exists()


def test_changes_that_concern_parents_need_a_label(capsys, tiny):
    before = fingerprint(tiny)
    assert "--label" in mistake(capsys, "train", "tiny", "--tau", 0.3)
    assert fingerprint(tiny) == before


def test_run_directory_with_another_config(capsys, tiny):
    before = fingerprint(tiny)
    message = mistake(capsys, "train", "tiny", "--steps", 30)
    assert "steps: 24 -> 30" in message and "--name" in message
    assert fingerprint(tiny) == before


def test_truncated_checkpoint(capsys, tiny):
    newest = tiny / "tiny" / "checkpoints" / "0000024"
    newest.rename(newest.with_name("gone"))
    weights = tiny / "tiny" / "checkpoints" / "0000018" / "networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = fingerprint(tiny)
    assert f"{weights} cannot be read" in mistake(capsys, "train", "tiny", "--quiet")
    assert fingerprint(tiny) == before


class Trap:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    save_file({k: v for name, t in tensors.items() for k, v in change(name, t)}, path)


def edit(path, **changes):
    """Change a JSON file; None drops a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


FOREIGN = {
    "a pickle": (
        lambda f: torch.save(
            {"tokenizer.a": Trap(f.parent / "executed")}, f / "networks.safetensors"
        ),
        "networks.safetensors cannot be read",
    ),
    "other names": (
        lambda f: save_file({"weight": torch.zeros(2)}, f / "networks.safetensors"),
        "holds no tokenizer: it holds weight",
    ),
    "no average": (
        lambda f: rewrite(
            f / "networks.safetensors",
            lambda n, t: [] if n.startswith("tokenizer_ema.") else [(n, t)],
        ),
        "holds no tokenizer_ema: it holds discriminator, tokenizer",
    ),
    "another shape": (
        lambda f: rewrite(
            f / "optimizers.safetensors", lambda n, t: [(n, t[:1] if t.dim() else t)]
        ),
        "do not fit this Optimizer:\n  0.exp_avg has shape (1, ",
    ),
    "another optimizer": (
        lambda f: rewrite(
            f / "optimizers.safetensors", lambda n, t: [(n.replace("exp_avg_sq", "momentum"), t)]
        ),
        "missing 0.exp_avg_sq",
    ),
    "no step": (
        lambda f: edit(f / "state.json", step=None),
        "state.json does not fit this run (step is missing, not 18)",
    ),
    "another run": (lambda f: edit(f / "state.json", config="abc"), "(config is abc, not "),
    "no losses": (
        lambda f: edit(f / "state.json", meter=None),
        "(meter.sums is missing; meter.counts is missing)",
    ),
    "a list": (lambda f: (f / "state.json").write_text("[1]"), "state.json does not fit this run"),
    "no metrics": (
        lambda f: (f.parent.parent / "metrics.jsonl").unlink(),
        "metrics.jsonl holds no line that can be read",
    ),
    "metrics cut short": (
        lambda f: (f.parent.parent / "metrics.jsonl").write_text(
            '{"step": 0}\n{"step": 7}\n\0\n{"step": 24}\n'
        ),
        "metrics.jsonl can be read up to step 7 only; the checkpoint is of step 18",
    ),
    "no configuration": (
        lambda f: (f.parent.parent / "config.json").write_text('{"st'),
        "config.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint(kind, capsys, tiny):
    """The checkpoint is neither executed nor overwritten, and the message says what does not fit."""
    spoil, message = FOREIGN[kind]
    folder = tiny / "tiny-tokenizer" / "checkpoints" / "0000018"
    shutil.rmtree(folder.with_name("0000024"))
    spoil(folder)
    before = fingerprint(tiny)
    assert message in mistake(capsys, "train", "tiny-tokenizer", "--quiet", "--device", "cpu")
    assert fingerprint(tiny) == before


def test_a_parent_that_trains_no_tokenizer(capsys, tiny):
    before = fingerprint(tiny)
    (tiny / "tiny").rename(
        tiny / "mine"
    )  # not the name of a recipe: only the checkpoint shows that it has no tokenizer
    for parent, message in (
        ("tiny", "'tiny' trains no tokenizer"),
        ("mine", "run 'mine' holds no tokenizer_ema: it holds generator"),
    ):
        assert message in mistake(
            capsys, "train", "tiny", "--tokenizer-run", parent, "--name", "child", "--quiet"
        )
    (tiny / "mine").rename(tiny / "tiny")
    assert fingerprint(tiny) == before


@pytest.mark.parametrize("name", ("weights.pt", "./weights.pt", "runs/tiny", Path("weights.pt")))
def test_a_path_is_not_the_name_of_a_run(name, tiny, home, monkeypatch):
    monkeypatch.chdir(home)
    torch.save({"a": Trap(home / "executed")}, home / "weights.pt")
    with pytest.raises(gear.UserError, match="is a path.* a run is opened by name"):
        gear.Run.open(name)
    for load in (gear.load_tokenizer, gear.load_generator):
        with pytest.raises(
            gear.UserError,
            match="holds Python objects|that is a folder; a run is opened by its name",
        ):
            load(name)
    assert not (home / "executed").exists()


def test_a_run_without_a_generator_cannot_sample(capsys, tiny, home):
    message = mistake(capsys, "sample", "tiny-tokenizer", "--out", home / "out.png")
    assert (
        "run 'tiny-tokenizer' holds no generator: it holds discriminator, tokenizer, tokenizer_ema."
        in message
    )
    assert not (home / "out.png").exists()


def test_non_finite_loss_stops_with_code_1(capsys, tiny):
    message = mistake(
        capsys,
        "train",
        "tiny-tokenizer",
        "--name",
        "sick",
        "--tokenizer-lr",
        1e18,
        "--save-every",
        1,
        "--quiet",
        code=1,
    )
    assert " is inf " in message or " is nan " in message
    assert "is saved in" in message and "lower learning rate" in message


def test_labels_out_of_range(capsys, tiny):
    assert "classes 0 to 23" in mistake(capsys, "sample", "tiny", "--labels", 24)


def test_sample_of_a_missing_run(capsys, tiny):
    assert "no run 'tinny'" in mistake(capsys, "sample", "tinny")


def test_a_folder_of_images_trains(home, capsys):
    """The README's 'your own images': classes from sub-folders, parents under the label."""
    for name in ("cat", "dog"):
        for i in range(30):
            picture(home / "pets" / name / f"{i}.png")
    main(
        [
            "train",
            "tiny-joint",
            "--source",
            str(home / "pets"),
            "--label",
            "pets",
            "--quiet",
            "--device",
            "cpu",
        ]
    )
    runs = home / "runs"
    assert {p.name for p in runs.iterdir()} == {"tiny-joint-pets", "tiny-tokenizer-pets"}
    assert '"num_classes": 2' in (runs / "tiny-joint-pets" / "config.json").read_text()


def test_classes_that_differ_from_the_configuration(home):
    """The folder has two classes and the configuration 24. Then the run has two classes, and the
    folder gains, loses and renames some.
    """
    for name in ("cat", "dog"):
        for i in range(10):
            picture(home / "pets" / name / f"{i}.png")
    config = replace(
        TINY,
        recipe="pets",
        stage="joint",
        steps=4,
        save_every=2,
        data=DataConfig(str(home / "pets")),
    )
    runtime = Runtime(device="cpu", quiet=True)
    with pytest.raises(
        gear.UserError, match=r"2 \(cat, dog\); this run has 24 \(generator.num_classes\)"
    ):
        train(config, "pets", runtime)
    assert not (home / "runs").exists()
    config = replace(config, generator=replace(config.generator, num_classes=2))
    shutil.rmtree(train(config, "pets", runtime).path / "checkpoints" / "0000004")
    before = fingerprint(home / "runs")
    (home / "pets" / "dog").rename(home / "pets" / "ant")
    with pytest.raises(
        gear.UserError,
        match=r"2 \(ant, cat\); this run has 2 \(cat, dog\).*Put the class folders back",
    ):
        train(config, "pets", runtime)
    picture(home / "pets" / "eel" / "0.png")
    for seen in (
        2,
        3,
    ):  # the number of classes in the configuration before, and in the folder now
        with pytest.raises(gear.UserError, match=r"3 \(ant, cat, eel\); this run has 2 "):
            train(
                replace(config, generator=replace(config.generator, num_classes=seen)),
                "pets",
                runtime,
            )
    assert fingerprint(home / "runs") == before


def test_python_m_gear_lists_its_commands():
    out = subprocess.run(
        [sys.executable, "-m", "gear", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"\n  {name} " in out for name in ("train", "sample", "figures", "runs"))


def test_claims_of_an_unknown_preset(capsys, home):
    assert "unknown preset 'scnes'. Did you mean 'scenes'? Known: scenes, " in mistake(
        capsys, "claims", "scnes"
    )
    main(["claims", "cifar10"])
    assert [p.name for p in (home / "figures" / "data").iterdir()] == [
        "claims-cifar10.csv"
    ]  # claims.csv holds the verdicts on scenes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--foo"], "unknown command '--foo'"),
        ([""], "unknown command ''"),
        (["train", ""], "unknown recipe ''"),
        (["train", "--foo"], "name a recipe"),
        (["train", "--", "-x"], "unknown recipe '-x'"),
        (["evaluate", ""], "'' is no name of a folder"),
        (["sample", ""], "a run is opened by name"),
        (["evaluate", "--", "-x"], "no run '-x'"),
        (["runs", "--foo"], "no --foo"),
        (["runs", "tinny"], "no run 'tinny'"),
        (["runs", ".."], "'..' is a path"),
    ],
)
def test_unknown_commands_names_and_options(arguments, message, capsys, home):
    assert message in mistake(capsys, *arguments)
    assert list(home.iterdir()) == []


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"gear {gear.__version__}\n"


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["sample", "tiny", "--tokenizer", "nowhere.pt"], "--tokenizer"),
        (["sample", "tiny", "--out", "x.jpg"], "--out"),
        (["sample", "tiny", "--out", "file/x.png"], "--out"),
        (["sample", "tiny", "--out", "broken/x.png"], "--out"),
        (["sample", "tiny", "--device", "gpu"], "--device"),
        (["reconstruct", "tiny", "--device", "cuda:99"], "--device"),
        (["reconstruct", "tiny", "--images", "nowhere"], "--images"),
        (["reconstruct", "tiny", "--out", "x.jpg"], "--out"),
        (["reconstruct", "tiny", "--out", "taken.png"], "--out"),
        (["train", "tiny", "--teacher", "dinov2-b=/nowhere", "--label", "t"], "--teacher"),
        (["train", "tiny", "--teacher", "dinov9", "--label", "t"], "--teacher"),
        (["train", "tiny", "--tokenizer-run", "nowhere", "--name", "t"], "--tokenizer-run"),
        (["train", "tiny", "--tokenizer-run", "a/b", "--name", "t"], "--tokenizer-run"),
        (["train", "tiny", "--name", "a/b"], "--name"),
        (["train", "tiny", "--label", "a/b"], "--label"),
    ],
)
def test_a_wrong_value_is_reported_with_its_option(
    arguments, option, capsys, tiny, home, monkeypatch
):
    monkeypatch.chdir(home)
    (home / "file").touch()
    (home / "broken").symlink_to("nowhere")
    (home / "taken.json").mkdir()
    before = fingerprint(home)
    assert mistake(capsys, *arguments).startswith(f"gear: {option}: ")
    assert fingerprint(home) == before


def test_runs_are_listed_beside_a_folder_that_is_not_a_run(tiny, capsys):
    (tiny / "vit").mkdir()
    (tiny / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (tiny / "tiny").rename(tiny / "tiny[1] *")
    main(["runs"])
    output = capsys.readouterr()
    assert [line[:14].strip() for line in output.out.splitlines()] == [
        "tiny-joint",
        "tiny-tokenizer",
        "tiny[1] *",
    ]
    assert "vit: not a run of gear" in output.err and "remove" not in output.err
    main(["runs", "tiny[1] *"])
    assert (
        capsys.readouterr().out.startswith("tiny[1] *  ") and "vit" not in capsys.readouterr().err
    )
    assert "config.json cannot be read" in mistake(capsys, "runs", "vit")


def test_a_closed_pipe_and_a_name_of_any_bytes(tiny, home):
    """There is no traceback if the output is closed early, or if a path holds bytes that the encoding
    of standard output lacks.
    """
    command = [sys.executable, "-m", "gear", "runs"]
    done = subprocess.run(
        f"{shlex.join(command)} | head -c 0", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    moved = os.fsencode(home) + b"/caf\xe9"
    os.rename(home / "runs", moved)
    environment = os.environ | {"GEAR_RUNS": os.fsdecode(moved), "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [*command[:3], "runs", "tinny"], capture_output=True, text=True, env=environment
    )
    assert (
        done.returncode == 2
        and "no run 'tinny'. Train it" in done.stderr
        and r"caf\udce9" in done.stderr
    )
    arguments = [
        *command[:3],
        "sample",
        "tiny",
        "--labels",
        "0",
        "--out",
        os.fsdecode(moved) + "/x.png",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and r"caf\udce9/x.png" in done.stdout, done.stderr


def test_a_removed_working_directory(home):
    command = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -P -m gear runs"
    environment = os.environ | {"PYTHONPATH": str(Path(gear.__file__).parent.parent)}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=home, env=environment
    )
    assert (
        done.returncode == 2
        and "the working directory is gone" in done.stderr
        and "Traceback" not in done.stderr
    )
