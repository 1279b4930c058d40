"""A user's mistake gets one message that says what was wrong and what to do, exit code 2, and loses nothing."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gear.__main__ import main


def mistake(capsys, *arguments, code=2):
    """Run the command; return its message after checking exit code and the absence of a traceback."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert stop.value.code == code and "Traceback" not in said.err
    return said.err + said.out


def fingerprint(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def picture(path, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), np.uint8)).save(path)


def test_unknown_command(capsys):
    assert "Did you mean 'train'?" in mistake(capsys, "trian", "tiny")


def test_unknown_recipe(capsys, home):
    assert "unknown recipe 'scenes-gaer'. Did you mean 'scenes-gear'?" in mistake(capsys, "train", "scenes-gaer-s0")
    assert not (home / "runs").exists()


def test_unknown_override_suggests_the_nearest(capsys, home):
    assert "--tau" in mistake(capsys, "train", "tiny", "--tua", "0.1")
    assert not (home / "runs").exists()


def test_missing_folder(capsys, home):
    message = mistake(capsys, "train", "tiny-tokenizer", "--source", home / "nowhere")
    assert f"no folder or zip of images at '{home / 'nowhere'}'" in message


def test_empty_folder(capsys, home):
    (home / "images").mkdir()
    assert "holds no images" in mistake(capsys, "train", "tiny-tokenizer", "--source", home / "images")


def test_image_size_not_divisible(capsys, home):
    message = mistake(capsys, "train", "tiny-tokenizer", "--image-size", 30)
    assert "30 x 30 is not divisible by the tokenizer's downsampling 4" in message
    assert not (home / "runs").exists()  # else the right command would meet the wrong configuration


def test_teacher_grid_unlike_the_token_grid(capsys, home):
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


def test_non_finite_loss_stops_with_code_1(capsys, tiny):
    message = mistake(capsys, "train", "tiny-tokenizer", "--name", "sick", "--tokenizer-lr", 1e18, "--save-every", 1,
                      "--quiet", code=1)  # fmt: skip
    assert " is inf " in message or " is nan " in message
    assert "stands in" in message and "lower learning rate" in message


def test_labels_out_of_range(capsys, tiny):
    assert "classes 0 to 23" in mistake(capsys, "sample", "tiny", "--labels", 24)


def test_sample_of_a_run_that_is_not_there(capsys, tiny):
    assert "no run 'tinny'" in mistake(capsys, "sample", "tinny")


def test_a_folder_of_images_trains(home, capsys):
    """The README's 'your own images': classes from sub-folders, parents under the label."""
    for name in ("cat", "dog"):
        for i in range(30):
            picture(home / "pets" / name / f"{i}.png")
    main(["train", "tiny", "--source", str(home / "pets"), "--label", "pets", "--quiet", "--device", "cpu"])
    runs = home / "runs"
    assert {p.name for p in runs.iterdir()} == {"tiny-pets", "tiny-joint-pets", "tiny-tokenizer-pets"}
    assert '"num_classes": 2' in (runs / "tiny-pets" / "config.json").read_text()


def test_python_m_gear_lists_its_commands():
    out = subprocess.run([sys.executable, "-m", "gear", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"gear {name}" in out for name in ("train", "sample", "figures", "runs"))
