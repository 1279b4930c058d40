"""The imagenet256 recipes equal Tables 15 and 16 of the paper line by line, as
gear/experiments/published.csv holds them.
"""

from dataclasses import replace

import pytest
import torch

from gear.config import flatten, to_dict
from gear.evaluation.evaluate import Sampling
from gear.experiments.presets import change
from gear.experiments.published import published
from gear.experiments.recipes import RECIPES, known
from gear.generator.config import GENERATORS
from gear.tokenizer.config import TOKENIZERS
from gear.training.optim import Optimizer


def name_of(value, named):
    """Return the key under which the dict `named` holds `value`."""
    return next(
        (name for name, other in named.items() if other == value), "none of the public ones"
    )


def size(config):
    """Return the name of a generator's public size, without the fields that have their own lines."""
    lines_of_their_own = {
        f: getattr(config.generator, f)
        for f in ("tap_layer", "projector_dim", "class_dropout", "condition_rotation")
    }
    return name_of(
        config.generator,
        {name: replace(other, **lines_of_their_own) for name, other in GENERATORS.items()},
    )


def adam(config):
    """Return the Adam optimizer of a run with this configuration."""
    return Optimizer([torch.nn.Linear(1, 1)], 0.0, config.optimizer).adam


TEACHERS = {
    "dinov2-b": "DINOv2",
    "dinov3-b": "DINOv3",
    "siglip2-b": "SigLIPv2",
    "vjepa2.1-b": "V-JEPA2.1",
}

# line of a table -> the values in the Config of a joint run that all have to equal the printed one
TABLE_15 = {
    "AR model": lambda c: [size(c)],
    "Alignment layer": lambda c: [c.generator.tap_layer],
    "REPA target": lambda c: [TEACHERS.get(c.teacher, c.teacher)],
    "Tokenizer": lambda c: [name_of(c.tokenizer, TOKENIZERS)],
    "Gradient": lambda c: [{"straight_through": "STE"}.get(c.objective.bridge, c.objective.bridge)],
    "Guidance temp. tau": lambda c: [c.objective.tau],
    "Align. coeff. lambda": lambda c: [c.objective.align_weight],
    "Resolution": lambda c: [c.data.image_size],
    "Training steps": lambda c: [c.steps],
    "Tokenizer init.": lambda c: [
        "✓" if c.tokenizer_run == f"{c.recipe.partition('-joint')[0]}-tokenizer" else "✗"
    ],
}
TABLE_16 = {
    "Batch size": lambda c: [c.batch_size],
    "Precision": lambda c: [c.precision],
    "Learning rate": lambda c: [c.optimizer.tokenizer_lr, c.optimizer.generator_lr],
    "Codebook size": lambda c: [c.tokenizer.codebook_size],
    "Optimizer": lambda c: [type(adam(c)).__name__],
    "CLS dropout": lambda c: [c.generator.class_dropout],
    "Adam beta1": lambda c: [adam(c).defaults["betas"][0]],
    "Adam beta2": lambda c: [c.optimizer.beta2, adam(c).defaults["betas"][1]],
    "Projector dim": lambda c: [c.generator.projector_dim],
    "EMA decay": lambda c: [c.optimizer.tokenizer_ema, c.optimizer.generator_ema],
    "Weight decay": lambda c: [adam(c).defaults["weight_decay"]],
    "Gradient clip": lambda c: [c.optimizer.clip],
    "Entropy": lambda c: [c.objective.entropy_weight],
    "Commitment": lambda c: [c.objective.commit_weight],
    "Perceptual (LPIPS)": lambda c: [c.objective.lpips_weight],
    "Adversarial (GAN)": lambda c: [c.objective.gan_weight],
    "Sampling temperature": lambda c: [Sampling().temperature],
    "Top-k": lambda c: [Sampling().top_k],
    "Top-p": lambda c: [Sampling().top_p],
}
NOT_COMPARED = {
    "torch.compile": "a setting of the Runtime, not of a configuration",
    "NTP loss": (
        "always 1: a term without a weight has weight 1 (State.descend); see test_weights_of_one"
    ),
    "Reconstruction (L1)": "always 1, as the NTP loss",
}
# column of Table 15 -> the recipe of its default cell
STUDIES = {
    "Temp. Tab. 5": "imagenet256-l-joint",
    "Coeff. Tab. 6": "imagenet256-l-joint",
    "Comp. Tab. 7": "imagenet256-l-joint",
    "Tok. Tab. 8": "imagenet256-l-joint",
    "Size Tab. 9": "imagenet256-l-joint",
    "Enc. Tab. 10": "imagenet256-l-joint",
    "Depth Tab. 11": "imagenet256-l-joint",
    "Init Tab. 12": "imagenet256-l-joint-no-init",
    "Res. Tab. 13": "imagenet256-l-joint",
}
SHORT = {"Enc. Tab. 10", "Depth Tab. 11", "Res. Tab. 13"}  # 100,000 steps, as in --steps 100000
# published column that holds the default of a list in Table 15 -> the column of that list
DEFAULTS = {
    "Size Tab. 9, default": "Size Tab. 9",
}
# The values of fields that neither table prints: those of the public code where it has them, else
# ours, which do not change the result.
UNPRINTED = {
    "recipe": "imagenet256-l-joint",
    "stage": "joint",
    "seed": 0,
    "log_every": 100,
    "eval_every": 5000,
    "save_every": 10_000,
    "eval_images": 512,
    "data.source": "imagenet",
    "data.train_images": 12_000,  # used by the source `scenes` only
    "data.val_images": 2_000,
    "data.interpolation": "bicubic",
    "data.flip": True,
    "data.labels": "class",
    "data.val_source": "",
    "generator.condition_rotation": "zero",
    "objective.disc_norm": "batch",
    "objective.gan_start": 0.0,
    "objective.disc_channels": 64,
    "objective.disc_layers": 3,
    "optimizer.warmup_steps": 1,  # the learning rate is constant
    "optimizer.decay_from": 1.0,
    "optimizer.decay_to": 0.1,
}
CELLS = {(line.row, line.column): line.value for line in published(15).itertuples()}


def default(row, column):
    """Return the default of a study. A cell may list several values; the default is the one that
    the other studies have.
    """
    values = CELLS[row, column].split("; ")
    if len(values) == 1:
        return values[0]
    others = {
        CELLS[row, other] for other in STUDIES if other != column and "; " not in CELLS[row, other]
    }
    assert len(others) == 1 and others <= set(values), (row, column)
    return others.pop()


def same(printed, value):
    return printed == value if isinstance(value, str) else float(printed) == value


def unlike(config, column=None):
    """List the lines of Table 16, or of a column of Table 15, that a configuration does not equal."""
    if column is None:
        expected = {line.row: line.value for line in published(16).itertuples()}
        table = TABLE_16
    else:
        expected = {row: default(row, column) for row in TABLE_15}
        table = TABLE_15
    return [
        row
        for row, values in table.items()
        if not all(same(expected[row], value) for value in values(config))
    ]


def unpinned(config):
    """List the fields of `UNPRINTED` whose values a configuration does not have."""
    values = flatten(to_dict(config))
    return [field for field, value in UNPRINTED.items() if values[field] != value]


def of_study(column):
    config = RECIPES[STUDIES[column]]
    return replace(config, steps=100_000) if column in SHORT else config


def test_every_line_is_compared_or_said_not_to_be():
    assert TABLE_16.keys() | NOT_COMPARED.keys() == set(published(16).row)
    assert TABLE_15.keys() == set(published(15).row)
    assert STUDIES.keys() | DEFAULTS.keys() == set(published(15).column)
    assert {CELLS[row, column] for row, column in CELLS if column in DEFAULTS} == {
        default("Alignment layer", "Size Tab. 9")
    }


@pytest.mark.parametrize("column", STUDIES)
def test_table_15(column):
    assert unlike(of_study(column), column) == []


@pytest.mark.parametrize("method", ["joint", "gear", "llamagen-repa", "tokenizer"])
@pytest.mark.parametrize("preset", ["b", "l", "xl", "l-lfq", "l-ibq"])
def test_table_16(preset, method):
    """Every run behind a number of Tables 5 to 13 has the shared settings."""
    assert unlike(RECIPES[f"imagenet256-{preset}-{method}"]) == []


def test_swept_cells_with_a_preset_of_their_own():
    sizes, taps = (CELLS[row, "Size Tab. 9"].split("; ") for row in ("AR model", "Alignment layer"))
    for name, tap in zip(sizes, taps):
        config = RECIPES[f"imagenet256-{name.lower()}-joint"]
        assert size(config) == name and config.generator.tap_layer == int(tap)
        assert set(unlike(config, "Size Tab. 9")) <= {"AR model", "Alignment layer"}
    for name in CELLS["Tokenizer", "Tok. Tab. 8"].split("; "):
        config = RECIPES[
            {"VQ-16": "imagenet256-l-joint"}.get(name, f"imagenet256-l-{name[:3].lower()}-joint")
        ]
        assert name_of(config.tokenizer, TOKENIZERS) == name and set(
            unlike(config, "Tok. Tab. 8")
        ) <= {"Tokenizer"}
    for gradient, variant in (("STE", "straight-through"), ("w/o L_GAN", "no-gan")):
        assert gradient in CELLS["Gradient", "Comp. Tab. 7"].split("; ")
        config = RECIPES[f"imagenet256-l-joint-{variant}"]
        assert unlike(config, "Comp. Tab. 7") == (["Gradient"] if gradient == "STE" else [])
        assert unlike(config) == ([] if gradient == "STE" else ["Adversarial (GAN)"])


def test_every_preset_has_every_method():
    presets = [name.removesuffix("-gear") for name in RECIPES if name.endswith("-gear")]
    methods = {
        name.removeprefix("scenes-ibq-") for name in RECIPES if name.startswith("scenes-ibq-")
    }
    assert len(presets) == 16 and len(methods) == 21  # "tiny" and the short schedule among them
    assert all(f"{preset}-{method}" in RECIPES for preset in presets for method in methods)
    assert known().endswith("; and detector-scenes, teacher-scenes, tiny")


def test_weights_of_one():
    """No configuration can change the weights of the NTP and reconstruction losses."""
    weights = [
        row for row in published(16).itertuples() if row.row in ("NTP loss", "Reconstruction (L1)")
    ]
    assert [float(row.value) for row in weights] == [1.0, 1.0]
    assert not [
        f
        for f in RECIPES["imagenet256-l-joint"].objective.__dict__
        if f.startswith(("ntp", "recon"))
    ]


OTHER = {  # other valid values of fields for which `changed` could not make one up
    "stage": "generator",
    "teacher": "dinov3-b",
    "precision": "float32",
    "data.image_size": 512,
    "tokenizer.quantizer": "ibq",
    "tokenizer.backbone": "magvit2",
    "generator.width": 2048,
    "generator.heads": 32,
    "generator.tap_layer": 9,
    "generator.condition_rotation": "identity",
    "objective.disc_norm": "group",
    "objective.bridge": "none",
    "objective.disc_layers": 4,
    "data.interpolation": "box",
}
# fields that have no other valid value in these runs
FIXED = {"tokenizer.init_from_data", "generator.text_slots", "generator.dual_layers"}


def changed(field, value):
    """Return another valid value of a field."""
    if field in OTHER:
        return OTHER[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, float):
        return value / 2 + 0.003
    return (*value, 1) if isinstance(value, list) else 2 * value + 1


FIELDS = flatten(to_dict(of_study("Temp. Tab. 5")))


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in FIXED])
def test_a_changed_field_is_noticed(field):
    """A change of any field changes a line of the tables or a value in UNPRINTED."""
    config = of_study("Temp. Tab. 5")
    assert unlike(config, "Temp. Tab. 5") + unlike(config) + unpinned(config) == []
    section, _, name = field.rpartition(".")
    value = changed(field, FIELDS[field])
    value = tuple(value) if isinstance(value, list) else value
    other = change(config, {section: {name: value}} if section else {name: value})
    assert unlike(other, "Temp. Tab. 5") + unlike(other) + unpinned(other) != []
    assert (field in UNPRINTED) == (not unlike(other, "Temp. Tab. 5") + unlike(other))


def test_lines_that_differ_are_named():
    config = change(
        of_study("Temp. Tab. 5"),
        dict(objective=dict(tau=0.05), optimizer=dict(beta2=0.95), steps=1),
    )
    assert unlike(config, "Temp. Tab. 5") == ["Guidance temp. tau", "Training steps"] and unlike(
        config
    ) == ["Adam beta2"]
