"""The images of a run are found again from any working directory and after they moved, with the
checks of the training.
"""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_same_run
from PIL import Image

from gear import data
from gear.__main__ import main
from gear.analysis.profiles import observed
from gear.config import UserError
from gear.data import DataConfig, trained_on
from gear.experiments.recipes import plan, recipe, train_with_parents
from gear.runs.run import Run
from gear.training.loop import Runtime, train

QUIET = Runtime(device="cpu", quiet=True)


@pytest.fixture
def pets(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "pets" / "bcd"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return tmp_path / "pets"


def short(source, **changes):
    config = recipe("tiny-tokenizer")
    config = replace(
        config,
        steps=4,
        eval_every=2,
        save_every=2,
        eval_images=4,
        data=replace(config.data, source=str(source)),
    )
    return replace(config, tokenizer=replace(config.tokenizer, init_from_data=False), **changes)


def trained(source, name="pets", **changes):
    planned = plan(short(source, **changes), name)
    return train(planned[-1][1], name, QUIET)


def test_a_run_finds_its_images_from_any_folder(pets, monkeypatch, tmp_path):
    """A relative path would name another folder in another working directory."""
    monkeypatch.chdir(tmp_path)
    run = trained("pets")
    assert run.config["data"]["source"] == str(pets)
    (tmp_path / "x" / "pets" / "k").mkdir(parents=True)
    shutil.copy(pets / "b" / "0.png", tmp_path / "x" / "pets" / "k" / "0.png")
    before = data.load(trained_on(run), "val")[0]
    monkeypatch.chdir(tmp_path / "x")
    assert (
        trained_on(run).source == str(pets)
        and (data.load(trained_on(run), "val")[0] == before).all()
    )


@pytest.mark.parametrize("change", ("added", "removed", "renamed"))
def test_changed_classes_are_an_error(pets, change):
    run = trained(pets)
    if change == "added":
        shutil.copytree(pets / "b", pets / "a")
    elif change == "removed":
        shutil.rmtree(pets / "b")
    else:
        (pets / "b").rename(pets / "a")
    for open_images in (trained_on, lambda run: observed(run, "val", 4)):
        with pytest.raises(UserError, match=r"classes in '.*pets': .*this run has 3 \(b, c, d\)"):
            open_images(run)


def test_images_that_moved_are_found_again(pets, tmp_path, capsys):
    run = trained(pets)
    moved = pets.rename(tmp_path / "moved")
    with pytest.raises(
        UserError,
        match="the images of run 'pets' are not at '.*/pets' any more.*gear data NEW --moved pets",
    ):
        trained_on(run)
    assert trained_on(run, str(moved)).source == str(moved)
    assert trained_on(run).source == str(moved)  # the new location is remembered
    assert trained(moved).config["data"]["source"] == str(pets)  # and it does not make another run
    moved.rename(pets)
    assert trained_on(run).source == str(pets)


def test_a_run_resumes_on_images_that_moved_to_the_same_bytes(pets, tmp_path):
    for name in ("whole", "cut"):
        trained(pets, name)
    shutil.rmtree(tmp_path / "runs" / "cut" / "checkpoints" / "0000004")
    shutil.move(pets, tmp_path / "moved")
    assert Run.open("cut").step == 2
    trained(tmp_path / "moved", "cut")
    assert_same_run(tmp_path / "runs" / "cut", tmp_path / "runs" / "whole")


@pytest.mark.parametrize("change", ("another image", "one more", "another size"))
def test_other_images_at_a_new_location_are_an_error(pets, tmp_path, change):
    run = trained(pets)
    new_folder = shutil.copytree(pets, tmp_path / "other")
    if change == "one more":
        shutil.copy(pets / "b" / "0.png", new_folder / "b" / "new.png")
    else:
        name = "x.png" if change == "another image" else "0.png"
        (new_folder / "b" / "0.png").unlink()
        Image.new("RGB", (32, 32)).save(new_folder / "b" / name)
    for use in (lambda: trained_on(run, str(new_folder)), lambda: trained(new_folder)):
        with pytest.raises(
            UserError,
            match=f"run 'pets' was trained on '{pets}', and '{new_folder}' holds other images",
        ):
            use()
    assert trained_on(run).source == str(pets)


def test_images_that_changed_at_their_old_location_are_reported(pets, capsys):
    run = trained(pets)
    shutil.copy(pets / "b" / "0.png", pets / "b" / "new.png")
    trained_on(run)
    line = (
        f"'{pets}' has changed since run 'pets' was trained: 61 images, 60 images when the run was "
        "trained"
    )
    assert line.replace("60 images when", "60 when") in capsys.readouterr().err


def test_scenes_do_not_move_and_a_run_may_lack_its_data_file(pets, tiny, tmp_path):
    with pytest.raises(UserError, match="was trained on 'scenes', which does not move to"):
        trained_on(Run.open("tiny"), str(pets))
    assert trained_on(Run.open("tiny")) == DataConfig(train_images=512, val_images=128)
    run = trained(pets)
    (run.path / "data.json").unlink()  # a run of an older version has none
    shutil.copytree(pets / "b", pets / "a")
    with pytest.raises(UserError, match="this run has 3 .generator.num_classes"):
        trained_on(run)
    for damage in ("", "[]", "{}", '{"source": 3}', "\0"):
        (run.path / "data.json").write_text(damage)
        with pytest.raises(UserError, match="data.json cannot be read"):
            trained_on(run)


def test_the_command_line_sets_the_new_location_of_images(pets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("pets", "pets-a")
    trained("pets", "pets-b")
    pets.rename(tmp_path / "moved")
    main(["data", "moved", "--moved", "pets-*"])
    output = capsys.readouterr().out
    assert "moved: 60 images" in output
    assert output.count(f"its images lie in {tmp_path / 'moved'}") == 2
    assert json.loads((tmp_path / "runs" / "pets-b" / "data.json").read_text())["source"] == str(
        tmp_path / "moved"
    )
    for words in (
        ["data", "nowhere"],
        ["data", "moved", "--moved", "none"],
        ["data"],
        ["data", "moved", "--labels", "no.txt"],
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_an_evaluation_requires_the_classes_of_the_training(pets, tmp_path, capsys, monkeypatch):
    base = recipe("tiny")
    config = replace(base, data=replace(base.data, source=str(pets)), eval_images=4)
    train_with_parents(plan(config, "tiny-pets", base, "pets"), QUIET)
    words = [
        "evaluate",
        "tiny-pets",
        "--count",
        "8",
        "--quiet",
        "--network",
        "scenes",
        "--metrics",
        "fd_scenes",
    ]
    main(words)
    first = capsys.readouterr().out
    shutil.copytree(pets / "b", pets / "a")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert (
        end.value.code == 2
        and "4 (a, b, c, d); this run has 3 (b, c, d)" in capsys.readouterr().err
    )
    shutil.rmtree(pets / "a")
    pets.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as end:
        main([*words, "--source", "nowhere"])
    assert end.value.code == 2 and "--source: there are no images at" in capsys.readouterr().err
    main([*words, "--source", str(tmp_path / "moved")])
    assert capsys.readouterr().out == first
    assert not os.path.exists(pets)


def test_another_order_of_classes_is_an_error(pets, tmp_path):
    for name, text in (("a.txt", "b\nc\nd\n"), ("z.txt", "d\nc\nb\n")):
        (tmp_path / name).write_text(text)

    def with_labels(labels):
        config = short(pets)
        config = replace(
            config, data=replace(config.data, labels=str(tmp_path / labels) if labels else "class")
        )
        return train(plan(config, "x")[-1][1], "x", QUIET)

    run = with_labels("a.txt")
    with pytest.raises(
        UserError, match="classes in '.*pets': 3 .d, c, b.; this run has 3 .b, c, d."
    ):
        with_labels("z.txt")
    assert with_labels("").name == "x"  # the class numbers are the same
    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    assert with_labels("moved.txt").name == "x" and trained_on(run).labels == str(
        tmp_path / "moved.txt"
    )


def test_images_with_the_same_names_and_other_sizes_are_reported(pets, capsys):
    run = trained(pets)
    for path in (pets / "b").iterdir():
        Image.new("RGB", (32, 32)).save(path)
    trained_on(run)
    assert (
        f"'{pets}' has changed since run 'pets' was trained: 60 images, 60 when"
        in capsys.readouterr().err
    )


def test_a_flat_folder_moves_too(tmp_path):
    for i in range(30):
        path = tmp_path / "flat" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    run = trained(tmp_path / "flat")
    (tmp_path / "flat").rename(tmp_path / "elsewhere")
    assert trained_on(run, str(tmp_path / "elsewhere")).source == str(tmp_path / "elsewhere")
    assert trained(tmp_path / "elsewhere").config["data"]["source"] == str(tmp_path / "flat")
