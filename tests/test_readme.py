"""What the README says is so: its commands run, its numbers are those of the tracked runs, its files exist."""

import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import gear
from gear.__main__ import main
from gear.analysis import claims
from gear.home import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
GEAR_COMMANDS = [c for c in COMMANDS if c.startswith("gear ")]


def on_tiny(command, home):
    """Substitute tiny for the scenes recipes, the test's folder for the user's, the CPU for the GPU."""
    command = re.sub(r"scenes-gear(-s0)?|cifar10-(smoke-)?gear-s0", "tiny", command)
    command = command.replace("~/images", str(home / "images")).replace("--device cuda", "--device cpu")
    return command.replace("samples.png", str(home / "samples.png"))


def test_make_targets_exist():
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert {"demo", "test", "lab"} <= set(targets)
    assert all(re.search(rf"^{t}: setup", MAKEFILE, re.M) for t in targets)


@pytest.mark.parametrize("command", GEAR_COMMANDS)
def test_commands_run(command, tiny, home, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = home / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(path)
    arguments = shlex.split(on_tiny(command, home))[1:]
    if arguments[0] == "train":
        shutil.rmtree(tiny / "tiny")
    if arguments[0] == "figures":
        monkeypatch.setattr(gear.render, "execute", lambda *_: (home / "figures" / "executed").mkdir(parents=True))
    if arguments[0] == "train":
        arguments.append("--quiet")
    main(arguments)
    if arguments[0] == "sample":
        assert Image.open(home / "samples.png").size[0] > 32


def test_python_example_runs(tiny):
    (block,) = blocks("python")
    names = {}
    source = block.replace("scenes-gear-s0", "tiny").replace("scenes-*", "tiny*").replace("[0, 2, 4]", "[0, 1, 3]")
    exec(compile(source, "README.md", "exec"), names)
    assert names["indices"].shape == (8, 8, 8) and names["logits"].shape == (8, 64, 64)
    assert names["pictures"].shape == (8, 32, 32, 3) and set(names["hidden"]) == {0, 1, 3}
    assert not names["table"].empty and names["run"].name == "tiny"


def test_links_and_figures_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"`((?:notebooks|gear)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_module_is_listed():
    listed = README[README.index("## The code") :]
    for path in (ROOT / "gear").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "_torchvision.py", "__pycache__"):
            assert path.name in listed, path.name


def test_numbers_are_those_of_the_tracked_runs(monkeypatch):
    """The README's table equals what the tracked metrics say, to the digits it prints."""
    monkeypatch.setenv("GEAR_RUNS", str(ROOT / "runs"))
    rows = re.findall(r"^\| `(scenes-[\w-]+)` \|[^|]*\|(.*)\|$", README, re.M)
    assert len(rows) == 4
    for name, cells in rows:
        last = pd.DataFrame([run.metrics().iloc[-1] for run in gear.open_runs(f"{name}-s[0-9]")])
        last["predictable"] = last["val/usage_entropy"] - last["val/ntp_loss"]
        wanted = last[["val/ntp_loss", "val/align_loss", "val/psnr", "val/usage_entropy", "predictable"]]
        for cell, (_, values) in zip(cells.split("|"), wanted.items()):
            mean, spread = (text.strip() for text in cell.split("+-"))
            tolerance = 0.51 * 10 ** -len(mean.split(".")[1])
            assert float(mean) == pytest.approx(values.mean(), abs=tolerance), (name, cell)
            assert float(spread) == pytest.approx(values.std(), abs=tolerance), (name, cell)


def test_claims_are_those_that_the_tracked_runs_bear_out(monkeypatch):
    """Judged again, the tracked runs give figures/claims.csv, and the README's table is that file."""
    monkeypatch.setenv("GEAR_RUNS", str(ROOT / "runs"))
    table = pd.read_csv(ROOT / "figures" / "claims.csv")
    again = claims.evaluate()
    for column in ("claim", "against", "verdict"):
        assert again[column].tolist() == table[column].tolist()
    assert again.difference.tolist() == pytest.approx(table.difference.tolist(), rel=1e-5)
    assert claims.markdown(table) in README
