"""The cells of the studies are the paper's; each changes one axis, shares runs with others where
possible, and is trained by one command.
"""

import pytest

from gear.cli.arguments import parse
from gear.cli.train import TrainOptions
from gear.config import UserError, differences, to_dict
from gear.experiments.presets import change
from gear.experiments.published import published
from gear.experiments.recipes import RECIPES, plan, recipe
from gear.experiments.results import scoring_words
from gear.experiments.studies import (
    STUDIES,
    Scoring,
    cell_name,
    members,
    of_study,
    seeds_of,
    space,
    study,
)

TEACHERS = {
    "dinov2-b": "DINOv2",
    "dinov3-b": "DINOv3",
    "siglip2-b": "SigLIPv2",
    "vjepa2.1-b": "V-JEPA2.1",
}
# study: its column of Table 15, the row that the study varies, and how to read a cell's value from
# the Config of its joint stage
AXES = {
    "temperature": ("Temp. Tab. 5", "Guidance temp. tau", lambda c: f"{c.objective.tau:g}"),
    "weight": ("Coeff. Tab. 6", "Align. coeff. lambda", lambda c: f"{c.objective.align_weight}"),
    "teacher": ("Enc. Tab. 10", "REPA target", lambda c: TEACHERS[c.teacher]),
    "depth": ("Depth Tab. 11", "Alignment layer", lambda c: f"{c.generator.tap_layer}"),
    "resolution": ("Res. Tab. 13", "Resolution", lambda c: f"{c.data.image_size}"),
    "size": ("Size Tab. 9", "Alignment layer", lambda c: f"{c.generator.tap_layer}"),
    "tokenizer": ("Tok. Tab. 8", "Tokenizer", lambda c: f"{c.tokenizer.quantizer.upper()}-16"),
}
ALLOWED = {  # study: the fields in which a cell's runs may differ from the preset's
    "temperature": {"objective.tau"},
    "weight": {"objective.align_weight"},
    "components": {"objective.bridge", "objective.gan_weight"},
    "size": {f"generator.{f}" for f in ("width", "layers", "heads", "tap_layer")},
    "teacher": {"teacher"},
    "depth": {"generator.tap_layer"},
    "initialisation": {"tokenizer_run"},
    "resolution": {"data.image_size"},
}
SHORT = {"teacher", "depth", "resolution"}


def joint(member):
    return next(config for _, config in member.planned if config.stage == "joint")


@pytest.mark.parametrize("name", AXES)
def test_the_cells_of_the_paper_are_its_bold_lists(name):
    """imagenet256-l has exactly the values and the schedules of Table 15."""
    column, row, value = AXES[name]
    table = {(line.row, line.column): line.value for line in published(15).itertuples()}
    gear = [m for m in members(name, "imagenet256-l", [0]) if m.role == "gear"]
    assert sorted(value(joint(m)) for m in gear) == sorted(table[row, column].split("; "))
    for member in members(name, "imagenet256-l", [0]):
        assert {c.steps for _, c in member.planned if c.stage != "tokenizer"} == {
            int(table["Training steps", column])
        }


@pytest.mark.parametrize("preset", ("scenes", "cifar10", "imagenet256-l", "imagenet100-128"))
@pytest.mark.parametrize("name", STUDIES)
def test_a_cell_changes_its_axis_and_nothing_else(name, preset):
    for member in members(name, preset, [1]):
        for n, config in member.planned:
            base = recipe(n.removesuffix(f"-{member.cell.label}") if member.cell.label else n)
            stem = f"{preset}{'-100k' if preset == 'imagenet256-l' and name in SHORT else ''}"
            if name in ("components", "initialisation"):
                base = recipe(f"{stem}-joint-s1") if config.stage == "joint" else base
            changed = {line.split(":")[0] for line in differences(to_dict(base), to_dict(config))}
            assert changed <= ALLOWED.get(name, set()) | {"recipe", "tokenizer_run"}, (n, changed)
            assert config.seed == 1


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_has_its_row_in_the_papers_table(name):
    rows = set(published(STUDIES[name].table).row)
    for preset in ("scenes", "cifar10", "imagenet256-l"):
        cells = STUDIES[name].cells(preset)
        assert {c.published for c in cells if c.published} <= rows
        if STUDIES[name].own_baseline:
            assert {c.published.removesuffix(", +GEAR") for c in cells if c.published} <= rows
        assert len({cell_name(c) for c in cells}) == len(cells) == len({c.title for c in cells})
    ours = {c.published for c in STUDIES[name].cells("imagenet256-l")}
    baselines = {row for row in rows if f"{row}, +GEAR" in rows} | {
        STUDIES[name].published_baseline
    }
    assert rows - baselines <= ours, "every row of the paper is a cell"


@pytest.mark.parametrize("name", STUDIES)
def test_a_cell_is_one_command(name):
    """`gear train WORDS` plans the runs of the Member, with the same configurations."""
    for member in members(name, "scenes", [2]):
        base = recipe(member.words[0])
        options = parse(TrainOptions(base), list(member.words[1:]))
        run = f"{member.words[0]}-{options.label}" if options.label else member.words[0]
        shared = options.share_warm_up
        planned = plan(options.config, run, base, options.label or None, share_warm_up=shared)
        assert run == member.name and planned == member.planned


def test_warm_ups_are_shared():
    for name in STUDIES.keys() - {"tokenizer"}:
        warm_ups = {
            n
            for m in members(name, "scenes", [0, 1])
            for n, c in m.planned
            if c.stage == "tokenizer"
        }
        assert warm_ups == {"scenes-tokenizer-s0", "scenes-tokenizer-s1"}, name
    assert {m.name for m in members("weight", "scenes", [0])} & {
        m.name for m in members("temperature", "scenes", [0])
    } == {
        "scenes-joint-s0",
        "scenes-llamagen-repa-s0",
    }


def test_mistakes_are_named():
    with pytest.raises(UserError, match="unknown study 'temprature'. Did you mean 'temperature'"):
        study("temprature")
    with pytest.raises(UserError, match="no study of preset 'scene'. Did you mean 'scenes'"):
        members("weight", "scene", [0])
    with pytest.raises(UserError, match="no cell tau-3. It has: tau-0.5, tau-0.1"):
        members("temperature", "scenes", [0], ["tau-3"])
    with pytest.raises(UserError, match="seeds are 'a,b'"):
        seeds_of("a,b")
    assert (
        seeds_of("2,0") == [0, 2]
        and space("scenes-gear") == "scenes"
        and space("imagenet256-l") == "inception"
    )


def test_the_short_family_starts_from_the_same_warm_up():
    assert RECIPES["imagenet256-l-100k-joint"] == change(
        RECIPES["imagenet256-l-joint"], dict(steps=100_000, recipe="imagenet256-l-100k-joint")
    )


@pytest.mark.parametrize("preset", ("scenes", "cifar10", "cifar10-smoke", "imagenet256-l"))
def test_sizes_are_aligned_at_a_third_of_their_depth(preset):
    for member in members("size", preset, [0]):
        generator = member.planned[-1][1].generator
        assert generator.layers == 3 * generator.tap_layer


@pytest.mark.parametrize("preset", ("scenes", "cifar10", "imagenet256-l", "imagenet100-128"))
@pytest.mark.parametrize("name", STUDIES)
def test_gear_is_the_joint_runs_own_generator(name, preset):
    """In the ablations (Sec. 4.1), GEAR is the generator of the joint stage, at the baseline's
    schedule; a fresh generator has the role "transfer".
    """
    stages = {"gear": "joint", "baseline": "generator", "transfer": "generator"}
    chosen = members(name, preset, [0], transfer=True)
    for member in chosen:
        assert member.planned[-1][1].stage == stages[member.role]
    schedules = {
        (
            config.steps,
            config.batch_size,
            config.optimizer.generator_lr,
            config.optimizer.decay_from,
        )
        for config in (member.planned[-1][1] for member in chosen)
    }
    assert len(schedules) == 1
    for member in chosen:
        if member.role == "transfer":
            assert member.planned[-1][1].tokenizer_run == member.planned[-2][0]
            assert member.planned[-2][0] in {m.name for m in chosen if m.role == "gear"}


def test_resolution_changes_the_joint_stage_alone():
    """In Table 13 all cells share one warm-up, and samples are compared at the preset's size."""
    for member in members("resolution", "imagenet256-l", [0]):
        *warm_up, (_, config) = member.planned
        assert [(n, c.data.image_size) for n, c in warm_up] == [("imagenet256-l-tokenizer-s0", 256)]
        size = config.data.image_size
        scoring = of_study("resolution", "imagenet256-l", Scoring())
        words = scoring_words("imagenet256-l", to_dict(config), scoring)
        assert ("--sample-size" in words) == (size != 256)
        assert words[words.index("--count") + 1] == "50000"
        plain = scoring_words(
            "imagenet256-l", to_dict(config), of_study("size", "scenes", Scoring())
        )
        assert "--sample-size" not in plain, "other studies do not resize samples"


def test_a_shared_warm_up_keeps_its_size_and_nothing_else():
    """A shared warm-up keeps the image size, but takes other changes of the data."""
    base = recipe("scenes-joint-s0")
    config = change(base, dict(data=dict(image_size=48, train_images=99)))
    planned = plan(config, "scenes-joint-s0-x", base, "x", share_warm_up=True)
    assert [(n, c.data.image_size, c.data.train_images) for n, c in planned] == [
        ("scenes-tokenizer-s0-x", 32, 99),
        ("scenes-joint-s0-x", 48, 99),
    ]
