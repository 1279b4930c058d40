"""What the README and docs/ say is so: its commands run, its numbers are those of the tracked runs, its
files exist.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import record_study
from PIL import Image

import gear
from gear.__main__ import main
from gear.experiments import results, verdicts
from gear.experiments.studies import Scoring
from gear.figures import render
from gear.figures.execution import parameters_of
from gear.files import ROOT
from gear.generator.config import GENERATORS, GeneratorConfig
from gear.generator.model import Generator
from gear.public.layouts import public_layout
from gear.tokenizer.config import TOKENIZERS, TokenizerConfig
from gear.tokenizer.model import Tokenizer

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README} | PAGES
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


COMMANDS = dict.fromkeys(
    re.split(r"\s+#", line)[0].strip()
    for text in TEXTS.values()
    for block in blocks(text, "bash")
    for line in block.replace("\\\n", "").splitlines()
    if line.strip() and not line.startswith("#")
)
GEAR_COMMANDS = [command for command in COMMANDS if command.startswith("gear ")]
OTHERS = [command for command in COMMANDS if not command.startswith("gear ")]


def on_tiny(command, home):
    """Substitute tiny for the recipes, the test's folder for the user's, the CPU for the GPU."""
    command = re.sub(r"scenes-gear(-s0)?\b|cifar10-(smoke-)?gear-s0", "tiny", command)
    command = re.sub(r"tiny-s1|imagenet256-l-joint(?! ?-s)", "tiny-joint", command)
    if command.startswith("gear sweep"):
        command = re.sub(r" --preset \S+", "", command) + " --preset tiny --count 100"
    if command.startswith("gear evaluate tiny --both"):
        command += " --count 500"
    command = command.replace("--count 500", "--count 70 --reference-count 100")
    command = command.replace("~/images", str(home / "images"))
    command = command.replace("--device cuda", "--device cpu")
    return command.replace("samples.png", str(home / "samples.png"))


@pytest.fixture
def files(home, monkeypatch):
    """What the README calls the user's own, small, in the working directory: photos, and files in
    public layouts.
    """
    monkeypatch.chdir(home)
    rng = np.random.default_rng(0)
    for i in range(40):
        for path in (
            home / "images" / "ab"[i % 2] / f"{i}.png",
            *([home / "photos" / f"{i}.png"] if i < 4 else []),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(path)
    tokenizer = TokenizerConfig(
        codebook_size=32, channels=4, channel_mult=(1, 1, 1, 1, 2), latent_channels=4, res_blocks=1
    )
    generator = GeneratorConfig(64, 3, 1, tap_layer=1, condition_rotation="zero")
    hybrid = replace(generator, text_slots=300, dual_layers=1)
    made = {
        "gear-vq": (tokenizer, "vq"),
        "c2i_L_256": ((generator, 32), "model"),
        "t2i_1b": ((hybrid, 32), "ar"),
    }
    for name, (size, entry) in made.items():
        layout = public_layout("tokenizer" if entry == "vq" else "generator", size)
        module = layout.build(size)
        names = layout.public(module)
        torch.save(
            {entry: {names[n]: t for n, t in module.state_dict().items()}}, home / f"{name}.pt"
        )


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_other_commands_exist():
    """Targets of make, notebooks and their parameters; torchrun's commands run in a slow test."""
    known = ("make ", "papermill ", "torchrun ", "source ", "export ")
    assert all(command.startswith(known) for command in OTHERS)
    targets = [command.split()[1] for command in OTHERS if command.startswith("make ")]
    assert {"demo", "test", "lab", "gpu"} <= set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)
    for command in (c for c in OTHERS if c.startswith("papermill ")):
        _, notebook, _, *options = command.split()
        assert set(options[1::3]) <= parameters_of(ROOT / notebook).keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in OTHERS if c.startswith("torchrun ")])
def test_torchrun_commands_run(command, tiny, home):
    shutil.rmtree(tiny / "tiny")
    words = shlex.split(on_tiny(command, home))[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29533"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert gear.Run.open("tiny").step == 24


@pytest.mark.parametrize("command", GEAR_COMMANDS)
def test_commands_run(command, tiny, home, files, monkeypatch):
    arguments = shlex.split(on_tiny(command, home).partition(" > ")[0])[1:]
    if arguments[0] == "train":
        shutil.rmtree(tiny / "tiny")
    if arguments[0] == "sweep":  # what is there is not done again
        record_study(arguments[1], seeds=(0, 1, 2))
    if arguments[0] == "figures":
        monkeypatch.setattr(
            render,
            "execute",
            lambda *_: (home / "figures" / "executed").mkdir(parents=True),
        )
    if arguments[0] == "train":
        arguments.append("--quiet")
    main(arguments)
    if arguments[0] == "sample":
        assert Image.open(home / "samples.png").size[0] > 32


def test_python_examples_run(tiny, files):
    (runs,) = blocks(README, "python")
    (checkpoints,) = blocks(PAGES["checkpoints.md"], "python")
    names = {}
    source = runs.replace("scenes-gear-s0", "tiny").replace("scenes-*", "tiny*")
    exec(compile(source, "README.md", "exec"), names)
    assert names["indices"].shape == (8, 8, 8) and names["logits"].shape == (8, 64, 64)
    assert names["pictures"].shape == (8, 32, 32, 3)
    assert not names["table"].empty and names["run"].name == "tiny"
    names = {}
    exec(compile(checkpoints.replace("[0, 8, 24]", "[0, 1, 3]"), "checkpoints.md", "exec"), names)
    assert (
        names["indices"].shape == (4, 16, 16)
        and names["A"].shape == (4, 256, 32)
        and names["logits"].shape == (4, 256, 32)
    )
    assert names["pictures"].shape == (4, 256, 256, 3) and names["hidden"][3].shape == (4, 256, 64)


def test_parameters_are_those_of_the_networks():
    """The table of networks in docs/checkpoints.md, counted."""
    with torch.device("meta"):
        networks = [Tokenizer(c) for c in TOKENIZERS.values()] + [
            Generator(c, 16_384) for c in GENERATORS.values()
        ]
    page = PAGES["checkpoints.md"]
    table = page[page.index("| network | layout |") :].split("\n\n")[0]
    assert sorted(int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{8,}", table)) == sorted(
        sum(p.numel() for p in network.parameters()) for network in networks
    )


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_figures_exist(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for path in re.findall(r"\]\(([\w/.]+)\)", TEXTS[name]):
        assert (folder / path).exists(), path
    for path in re.findall(r"`((?:notebooks|gear|tests|figures|benchmarks)/[\w/.]+)`", TEXTS[name]):
        assert (ROOT / path).exists() or path == "figures/demo", path


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_whom_it_is_for(name):
    first = PAGES[name].split("\n\n")[1]
    assert re.match(r"This page is for you if|For those who", first), first


def test_every_folder_is_listed():
    listed = README[README.index("## The code") :]
    for path in (ROOT / "gear").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "_torchvision.py", "__pycache__"):
            assert path.name in listed, path.name


def test_lengths_of_algorithm_1_are_those_of_the_files():
    text = README[README.index("Algorithm 1 of the paper in five files") :].split("\n\n")[0]
    lengths = re.findall(r"`(gear/[\w/]+\.py)` \([^)]*?(\d+)(?: lines)?\)", text)
    assert len(lengths) == 5
    for path, length in lengths:
        assert len((ROOT / path).read_text().splitlines()) == int(length), path


def test_a_term_is_defined_once():
    terms = re.findall(r"^\| ([^|]+) \|", PAGES["glossary.md"], re.M)[2:]
    assert len(terms) == len(set(terms)) > 25


def test_numbers_are_those_of_the_tracked_runs(monkeypatch):
    """The README's table equals what the tracked metrics say, to the digits it prints."""
    monkeypatch.setenv("GEAR_RUNS", str(ROOT / "runs"))
    rows = re.findall(r"^\| `(scenes-[\w-]+)` \|[^|]*\|(.*)\|$", README, re.M)
    assert len(rows) == 4
    for name, cells in rows:
        last = pd.DataFrame([run.metrics().iloc[-1] for run in gear.open_runs(f"{name}-s[0-9]")])
        scores = results.quality(f"{name}-s[0-9]", Scoring(1000), scales=(1.0,))
        columns = last[["val/ntp_loss", "val/align_loss", "val/psnr"]].assign(
            fd=scores[scores.metric == "fd"].value.to_numpy()
        )
        for cell, (_, values) in zip(cells.split("|"), columns.items(), strict=True):
            mean, spread = (text.strip() for text in cell.split("±"))
            tolerance = 0.51 * 10 ** -len(mean.split(".")[1])
            assert float(mean) == pytest.approx(values.mean(), abs=tolerance), (name, cell)
            assert float(spread) == pytest.approx(values.std(), abs=tolerance), (name, cell)


def test_claims_are_those_that_the_tracked_runs_bear_out(monkeypatch):
    """Judged again, the tracked runs give figures/data/claims.csv, and docs/results.md is that
    table in words.
    """
    monkeypatch.setenv("GEAR_RUNS", str(ROOT / "runs"))
    table = pd.read_csv(ROOT / "figures" / "data" / "claims.csv")
    table = table.fillna(dict.fromkeys(["paper", "verdict", "verdict_corrected", "needs"], ""))
    again = verdicts.claims()
    for column in ("claim", "against", "verdict", "verdict_corrected"):
        assert again[column].tolist() == table[column].tolist()
    assert again.difference.tolist() == pytest.approx(table.difference.tolist(), rel=1e-5)
    assert PAGES["results.md"] == verdicts.results_page(table)
