"""The probe: its numbers equal those of the functions it calls, for runs and for files, and it
refuses what cannot be compared.
"""

import hashlib
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import scenes

from gear import figures, load_generator, load_tokenizer
from gear.analysis import probe
from gear.analysis.features import generator_features, teacher_features, tokenizer_features
from gear.analysis.profiles import profile, tokenizer_table
from gear.checkpoints import open_checkpoint
from gear.config import UserError
from gear.data import DataConfig
from gear.figures import render
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator
from gear.measures import codes
from gear.measures.reconstruction import l1, psnr
from gear.public.containers import Checkpoint, Part, export
from gear.public.layouts import public_layout
from gear.runs.run import Run
from gear.teachers.scenes import load_scenes_teacher
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer

N, K, TAU = 12, 5, 0.05
CONFIG = DataConfig("scenes", 32)
SMALL = TokenizerConfig(
    codebook_size=64,
    code_dim=4,
    channels=8,
    channel_mult=(1, 2, 2),
    latent_channels=16,
    res_blocks=1,
)


@pytest.fixture(scope="module")
def images():
    return scenes(N, first=1 << 40)  # the validation images of DataConfig("scenes")


def write(path, kind, module, size):
    """Write a network to a file in its public layout, wrapped as in the public GEAR code."""
    part = Part(module.state_dict(), size, public_layout(kind, size))
    export(Checkpoint(path.name, "gear", {kind: part}, step=7), path)
    return str(path)


def tokenizer_file(path, **changes):
    torch.manual_seed(0)
    size = replace(SMALL, **changes)
    return write(path, "tokenizer", Tokenizer(size), size)


def generator_file(path, codebook_size=64, **changes):
    config = GeneratorConfig(
        64, layers=3, heads=1, tap_layer=1, condition_rotation="zero", **changes
    )
    return write(path, "generator", Generator(config, codebook_size), (config, codebook_size))


def value(table, metric, level, layer=None):
    lines = table[(table.metric == metric) & (table.level == level)]
    return (lines if layer is None else lines[lines.layer == layer]).value.item()


@pytest.mark.parametrize(
    "changes", [{}, dict(quantizer="lfq", backbone="magvit2", code_dim=6), dict(quantizer="ibq")]
)
def test_numbers_equal_those_of_the_called_functions(changes, images):
    """For every quantizer; means over batches equal means over all images."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(SMALL, **changes)).eval()
    pictures, _ = images
    target = load_scenes_teacher()(pictures)
    indices, table = probe.probe_tokenizer(tokenizer, pictures, TAU, target, K)
    assert torch.equal(indices, tokenizer.encode(pictures))
    with torch.no_grad():
        decoded, affinity = (
            tokenizer.decode(indices),
            tokenizer.affinity(pictures).dense.flatten(0, 1),
        )
    assert value(table, "psnr", "image") == pytest.approx(
        psnr(decoded, pictures).mean().item(), rel=1e-5
    )
    assert value(table, "l1", "image") == pytest.approx(
        l1(decoded, pictures).mean().item(), rel=1e-5
    )
    used = codes.usage(indices, 64)
    assert (
        value(table, "usage_entropy", "codes") == used.entropy
        and value(table, "usage_dead", "codes") == used.dead
    )
    ranks = table[table.level == "rank"]
    assert (
        ranks.value.tolist() == [used.top_mass[int(m) - 1].item() for m in ranks.x]
        and ranks.x.iloc[-1] == 64
    )
    for name, tau in (("assignment_tau", TAU), ("assignment_one", 1.0)):
        assert value(table, name, "token") == pytest.approx(
            codes.assignment(affinity, tau).entropy, rel=1e-4
        )
        curve = table[(table.metric == name) & (table.level == "quantile")].set_index("x").value
        assert curve.is_monotonic_increasing and curve[0] <= value(table, name, "token") <= curve[1]
    expected = tokenizer_table(tokenizer_features(tokenizer, pictures), target, K)
    profiled = table[table.layer.notna()].reset_index(drop=True)[expected.columns]
    pd.testing.assert_frame_equal(profiled, expected, rtol=1e-3, check_dtype=False)


def test_a_run_and_the_file_it_is_exported_to_are_one_tokenizer_under_two_names(tiny, home, images):
    export(open_checkpoint("tiny-joint"), home / "mine.safetensors")
    run, file = probe.open_tokenizers("tiny-joint", "", str(home / "mine.safetensors"))
    assert (run.name, run.step, run.config_hash) == (
        "tiny-joint",
        24,
        Run.open("tiny-joint").config_hash,
    )
    digest = hashlib.sha256((home / "mine.safetensors").read_bytes()).hexdigest()
    assert (file.name, file.step, file.config_hash) == ("mine.safetensors", 24, digest[:12])
    assert (run.trained_on, file.trained_on, run.stride) == ("scenes", None, 4)
    tables = [
        probe.probe_tokenizer(subject.tokenizer, images[0], TAU, None, K)[1]
        for subject in (run, file)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_networks_return_to_the_cpu_after_the_block():
    """The notebook continues with CPU images, after an error as well."""
    network = torch.nn.Linear(2, 2)
    moves = []
    to = network.to
    network.to = lambda device: (moves.append(device), to("cpu"))[1]
    with pytest.raises(UserError), probe.on_device("cuda:1", network) as networks:
        assert networks == [network] and moves == ["cuda:1"]
        raise UserError("an error in the block")
    assert moves == ["cuda:1", "cpu"]


def test_two_checkpoints_of_one_name_are_refused(home):
    paths = [tokenizer_file(home / "vq.pt"), tokenizer_file(home / "other" / "vq.pt")]
    with pytest.raises(UserError, match="two checkpoints are called 'vq.pt'"):
        probe.open_tokenizers(*paths)


def test_a_generator_is_probed_with_its_own_tokenizer_and_the_images_classes(tiny, images):
    """Layers 0, tap, middle and last equal those of `generator_features` for the run."""
    pictures, labels = images
    reader = probe.open_generator("tiny", load_tokenizer("tiny-tokenizer"))
    assert reader.tokenizer.source.endswith("of tiny (gear, step 24)")
    assert torch.equal(reader.condition("scenes", labels), labels)
    target = teacher_features(load_scenes_teacher(), pictures)
    table = probe.probe_generator(reader, pictures, labels, target, K)
    assert table.layer.unique().tolist() == [0, 1, 3]
    hidden = generator_features(
        load_generator("tiny"), load_tokenizer("tiny"), pictures, labels, [0, 1, 3]
    )
    pd.testing.assert_frame_equal(table, profile(hidden, target, K), rtol=1e-3)


def test_a_generator_from_elsewhere_is_given_no_class(tiny, home, images):
    """A file does not state its classes, and images of another source have other classes."""
    tokenizer = load_tokenizer("tiny")
    _, labels = images
    file = probe.open_generator(generator_file(home / "c2i.pt", num_classes=24), tokenizer)
    assert file.tokenizer is tokenizer and file.step == 7
    assert file.condition("scenes", labels).tolist() == [24] * N
    assert probe.open_generator("tiny", tokenizer).condition("~/pets", labels).tolist() == [24] * N


def test_mismatched_networks_and_values_are_refused(home, images):
    tokenizer = load_tokenizer(tokenizer_file(home / "vq.pt"))
    with pytest.raises(
        UserError,
        match="'.*t2i.pt' is conditioned on captions, which images do not have: give a generator of",
    ):
        probe.open_generator(generator_file(home / "t2i.pt", text_slots=300, text_dim=8), tokenizer)
    with pytest.raises(
        UserError,
        match="c2i.pt' knows 32 codes, but tokenizer of vq.pt .* has 64: give the tokenizer it was",
    ):
        probe.open_generator(generator_file(home / "c2i.pt", codebook_size=32), tokenizer)
    with pytest.raises(UserError, match="tau is 0.0: it has to be at least 1e-06"):
        probe.probe_tokenizer(tokenizer, images[0], 0.0, None, K)
    with pytest.raises(UserError, match="count is 1: it has to be at least 2"):
        probe.load_images(CONFIG, 1)
    for k in (0, 63):
        with pytest.raises(
            UserError,
            match=f"with 64 tokens an image: k is {k}: it has to be at least 1 and at most 62",
        ):
            probe.teacher_targets("", CONFIG, images[0], [4], k)


def test_targets_have_the_grid_of_each_tokenizer_or_the_teacher_is_refused(images):
    targets = probe.teacher_targets("scenes", CONFIG, images[0], [4, 4], K)
    assert list(targets) == [4] and torch.equal(targets[4], load_scenes_teacher()(images[0]))
    assert probe.teacher_targets("", CONFIG, images[0], [8, 4], K) == {4: None, 8: None}
    with pytest.raises(
        UserError,
        match="the teacher divides 32 px into 8 x 8 patches, the tokenizer into 4 x 4 tokens",
    ):
        probe.teacher_targets("scenes", CONFIG, images[0], [4, 8], K)
    with pytest.raises(
        UserError, match="36 x 36 is not divisible by the tokenizer's downsampling 8"
    ):
        probe.teacher_targets("", replace(CONFIG, image_size=36), images[0], [8], K)


def test_without_a_teacher_maps_are_described_and_nothing_is_aligned(images):
    tokenizer = Tokenizer(SMALL).eval()
    _, maps_only = probe.probe_tokenizer(tokenizer, images[0], TAU, None, K)
    _, compared = probe.probe_tokenizer(
        tokenizer, images[0], TAU, load_scenes_teacher()(images[0]), K
    )
    assert set(maps_only.metric) == set(compared.metric) - {"cka", "cknna"}
    assert "teacher" not in set(maps_only.layer)
    for metric in ("moran", "high_frequency"):
        assert value(maps_only, metric, "map", "pre") == value(compared, metric, "map", "pre")


def test_the_notebook_runs_with_one_public_file_only(home):
    """Without a second checkpoint, generator and teacher, the figure states the file's name, step
    and hash, and has no alignment panels.
    """
    path = home / "vq.pt"
    parameters = {
        "checkpoint": tokenizer_file(path),
        "other": "",
        "generator": "",
        "teacher": "",
        "count": 8,
        "k": 5,
    }
    executed = render.execute("probe", parameters)
    head, *_ = (home / "figures" / "data" / "probe.csv").read_text().splitlines()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert json.loads(head.removeprefix("# "))["runs"] == {"vq.pt": {"step": 7, "config": digest}}
    table = pd.read_csv(home / "figures" / "data" / "probe.csv", comment="#")
    assert not {"cka", "cknna"} & set(table.metric) and set(table.subject) == {"vq.pt"}
    assert "No teacher: nothing is aligned." in executed.read_text()


def test_a_figure_of_a_file_states_its_provenance(home):
    subject = probe.Subject("vq.pt", None, "0123456789ab", None, None)
    fig, (axis,) = figures.panels("a")
    axis.plot([1, 2])
    figures.save(
        fig, "test", [subject], pd.DataFrame({"x": [1.0]}), n="8", interval="none", face="8 images"
    )
    head = (home / "figures" / "data" / "test.csv").read_text().splitlines()[0]
    assert json.loads(head.removeprefix("# "))["runs"] == {
        "vq.pt": {"step": None, "config": "0123456789ab"}
    }
    assert fig.get_supxlabel() == "8 images\nn: 8."
