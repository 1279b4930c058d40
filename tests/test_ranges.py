"""Every number in a configuration, an option or a notebook has a range, which is checked when the
object is built. Values below, at and above both ends are tested.
"""

import dataclasses
import importlib
import math
import re
import typing
from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest
import torch
from helpers import TOKENIZER, recorded

import gear.__main__
from gear.__main__ import main
from gear.analysis import calibration, probe, probes, profiles
from gear.analysis.sensitivity import generator_sensitivity, tokenizer_sensitivity
from gear.cli.claims import ClaimOptions
from gear.cli.data import DataOptions
from gear.cli.evaluate import EvaluateCommand
from gear.cli.figures import FigureOptions
from gear.cli.pack import PackOptions
from gear.cli.reconstruct import ReconstructOptions
from gear.cli.sample import SampleOptions
from gear.cli.sweep import SweepOptions
from gear.cli.train import TrainOptions
from gear.config import (
    MOST,
    Checked,
    Range,
    UserError,
    check_value,
    from_dict,
    read_numbers,
    to_dict,
)
from gear.data import DataConfig
from gear.device import find_device, open_device
from gear.evaluation.evaluate import EvaluateOptions, Sampling, read_metrics
from gear.evaluation.protocols import protocol_sensitivity
from gear.experiments import results
from gear.experiments.jobs import train_many
from gear.experiments.recipes import RECIPES, plan, recipe
from gear.experiments.studies import Scoring, seeds_of
from gear.experiments.sweep import sweep
from gear.figures import render
from gear.figures.execution import parameters_of
from gear.figures.parameters import RANGES, READ
from gear.generator.config import GeneratorConfig
from gear.interactive.monitor import Compare
from gear.interactive.tour import samples
from gear.runs.run import Run
from gear.tokenizer.config import TokenizerConfig
from gear.training.loop import Runtime, train
from gear.training.settings import Config, ObjectiveConfig, OptimizerConfig

NAN = math.nan
INF = math.inf
# Four values of a field: below its range, its least, its largest, above its range.
COUNT = (0, 1, MOST, MOST + 1)
WHOLE = (-1, 0, MOST, MOST + 1)
SAMPLES = (1, 2, MOST, MOST + 1)
SEED = (-1, 0, 2**32 - 1, 2**32)
PARALLEL = (-1, 0, 1024, 1025)
JOBS = (0, 1, 1024, 1025)
NOT_NEGATIVE = (-1e-9, 0, 1e300, INF)
SHARE = (-1e-9, 0, 1, 1 + 1e-9)
BELOW_ONE = (-1e-9, 0, 1 - 2**-53, 1)
GUIDANCE = (-1e-9, 0, 1e6, 1e6 + 1)

# {class: (an instance, {field: its four values})}. A dict stands for a value together with other
# fields that it requires.
TABLE = {
    Config: (
        RECIPES["tiny-joint"],
        {
            "steps": (0, 1, 9_999_999, 10_000_000),
            "seed": SEED,
            "batch_size": COUNT,
            "log_every": COUNT,
            "eval_every": COUNT,
            "save_every": COUNT,
            "eval_images": COUNT,
        },
    ),
    TokenizerConfig: (
        TOKENIZER,
        {
            "codebook_size": (1, 2, MOST, MOST + 1),
            "code_dim": COUNT,
            "channels": COUNT,
            "channel_mult": COUNT,
            "latent_channels": COUNT,
            "res_blocks": (-1, {"res_blocks": 0, "channel_mult": (1, 1)}, MOST, MOST + 1),
        },
    ),
    GeneratorConfig: (
        RECIPES["tiny"].generator,
        {
            "width": (0, {"width": 4, "heads": 1}, MOST, MOST + 1),
            "layers": COUNT,
            "num_classes": COUNT,
            "heads": (0, 1, {"heads": MOST // 4, "width": MOST}, MOST + 1),
            "projector_dim": COUNT,
            "tap_layer": (-1, 0, {"tap_layer": 3, "layers": 3}, MOST + 1),
            "class_dropout": SHARE,
            "dropout": BELOW_ONE,
            "embed_std": NOT_NEGATIVE,
            "text_slots": WHOLE,
            "text_dim": COUNT,
            "dual_layers": (-1, 0, {"dual_layers": 3, "text_slots": 1}, MOST + 1),
        },
    ),
    ObjectiveConfig: (
        RECIPES["tiny"].objective,
        {
            "lpips_weight": NOT_NEGATIVE,
            "gan_weight": NOT_NEGATIVE,
            "gan_start": SHARE,
            "entropy_weight": NOT_NEGATIVE,
            "commit_weight": NOT_NEGATIVE,
            "align_weight": NOT_NEGATIVE,
            "tau": (0, 1e-6, 1e300, INF),
            "disc_channels": COUNT,
            "disc_layers": COUNT,
        },
    ),
    OptimizerConfig: (
        OptimizerConfig(),
        {
            "tokenizer_lr": NOT_NEGATIVE,
            "generator_lr": NOT_NEGATIVE,
            "beta2": BELOW_ONE,
            "clip": (0, 5e-324, 1e300, INF),
            "warmup_steps": WHOLE,
            "decay_from": SHARE,
            "decay_to": SHARE,
            "tokenizer_ema": BELOW_ONE,
            "generator_ema": BELOW_ONE,
        },
    ),
    Runtime: (
        Runtime(),
        {
            "workers": PARALLEL,
            "threads": PARALLEL,
            "accumulate": COUNT,
            "keep": COUNT,
            "skip": WHOLE,
        },
    ),
    Sampling: (
        Sampling(),
        {
            "count": SAMPLES,
            "cfg_scale": GUIDANCE,
            "temperature": GUIDANCE,
            "top_k": WHOLE,
            "top_p": SHARE,
            "seed": SEED,
        },
    ),
    EvaluateOptions: (
        EvaluateOptions(),
        {
            "reference_count": WHOLE,
            "sample_size": WHOLE,
            "image_size": (-1, 0, 16_384, 16_385),
            "steps": COUNT,
        },
    ),
    EvaluateCommand: (EvaluateCommand(), {}),
    TrainOptions: (
        TrainOptions(RECIPES["tiny"]),
        {"jobs": JOBS, "utilisation": (0, 5e-324, 1, 1 + 1e-9)},
    ),
    SweepOptions: (SweepOptions(), {"jobs": PARALLEL, "workers": PARALLEL}),
    Scoring: (Scoring(), {"count": WHOLE, "sample_size": WHOLE}),
    SampleOptions: (
        SampleOptions(),
        {
            "grid": (-1, 0, 1024, 1025),
            "labels": WHOLE,
            "cfg_scale": GUIDANCE,
            "temperature": GUIDANCE,
            "top_k": WHOLE,
            "top_p": SHARE,
            "seed": SEED,
        },
    ),
    ReconstructOptions: (
        ReconstructOptions(),
        {"image_size": (-1, 0, 16_384, 16_385), "count": COUNT},
    ),
    FigureOptions: (FigureOptions(), {"jobs": JOBS}),
    ClaimOptions: (ClaimOptions(), {}),
    PackOptions: (PackOptions(), {}),
    DataConfig: (
        DataConfig(),
        {"image_size": (0, 1, 16_384, 16_385), "train_images": COUNT, "val_images": COUNT},
    ),
    DataOptions: (DataOptions(), {"count": WHOLE}),
}
ROWS = [(cls, name) for cls, (_, rows) in TABLE.items() for name in rows]
IDS = [f"{cls.__name__}.{name}" for cls, name in ROWS]


def bare(kind):
    """Return (type, range, is_tuple) of a field annotated `kind`: the type of its values or of its
    elements, their Range or None, and whether it is a tuple.
    """
    is_tuple = typing.get_origin(kind) is tuple
    if typing.get_origin(kind) is typing.Union:  # a number or a word: the number counts here
        kind = typing.get_args(kind)[0]
    kind = typing.get_args(kind)[0] if is_tuple else kind
    bounds = next((b for b in typing.get_args(kind)[1:] if isinstance(b, Range)), None)
    return (
        typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind,
        bounds,
        is_tuple,
    )


def kinds(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: bare(hints[field.name]) for field in dataclasses.fields(cls)}


def built(cls, name, value):
    """Return the instance of `cls` in TABLE with another `value` of a field; a tuple gets `value` as
    its only element.
    """
    changes = (
        value if isinstance(value, dict) else {name: (value,) if kinds(cls)[name][2] else value}
    )
    return replace(TABLE[cls][0], **changes)


def test_the_table_has_every_number_of_every_class():
    """The test fails for a class or a field that is not in TABLE, or for one without a range."""
    for name in gear.__main__.COMMANDS:  # every module that has options
        importlib.import_module(f"gear.cli.{name}")
    assert set(TABLE) == {
        cls for cls in Checked.__subclasses__() if cls.__module__.startswith("gear.")
    }
    for cls, (_, rows) in TABLE.items():
        numbers = {
            name: bounds for name, (kind, bounds, _) in kinds(cls).items() if kind in (int, float)
        }
        assert set(numbers) == set(rows) and all(numbers.values()), cls


@pytest.mark.parametrize("cls, name", ROWS, ids=IDS)
def test_a_number_below_at_and_above_its_range(cls, name):
    below, least, largest, above = TABLE[cls][1][name]
    for value in (below, above):
        with pytest.raises(UserError, match=rf"^{name} is {re.escape(str(value))}: it has to be "):
            built(cls, name, value)
    for value in (least, largest):
        built_value = getattr(built(cls, name, value), name)
        if isinstance(value, dict):
            expected = value[name]
        else:
            expected = (value,) if isinstance(built_value, tuple) else value
        assert built_value == expected


@pytest.mark.parametrize("cls, name", ROWS, ids=IDS)
def test_no_number_is_infinite_or_none_or_of_another_type(cls, name):
    wrong = [NAN, INF, -INF, "1", "", None, True, False, [1], {}, 1j, np.int64(1), torch.tensor(1)]
    wrong += [1.5, 1.0] if kinds(cls)[name][0] is int else []
    for value in wrong:
        with pytest.raises(UserError, match=f"^{name} is "):
            built(cls, name, value if not isinstance(value, dict) else {name: value})
    if kinds(cls)[name][2]:
        for value in (1, None, [1], "1"):
            with pytest.raises(UserError, match=f"^{name} is .*: it has to be a tuple"):
                replace(TABLE[cls][0], **{name: value})


OTHERS = [
    (cls, name)
    for cls in TABLE
    for name, (kind, _, _) in kinds(cls).items()
    if kind not in (int, float)
]


@pytest.mark.parametrize(
    "cls, name", OTHERS, ids=[f"{cls.__name__}.{name}" for cls, name in OTHERS]
)
def test_what_is_no_number_has_its_type_too(cls, name):
    for value in (None, 1, NAN, ["x"], object()):
        with pytest.raises(UserError, match=f"^{name} is .*: it has to be "):
            replace(TABLE[cls][0], **{name: value})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_built_again_from_its_json(name):
    assert from_dict(Config, to_dict(RECIPES[name])) == RECIPES[name]


@pytest.mark.parametrize(
    "section, name",
    [("", "steps"), ("optimizer", "clip"), ("objective", "tau"), ("tokenizer", "channels")],
)
@pytest.mark.parametrize("value", ("100", None, [1, 2], {"a": 1}, -1, NAN, True))
def test_a_configuration_file_is_held_to_the_same(section, name, value):
    values = to_dict(RECIPES["tiny-joint"])
    (values[section] if section else values)[name] = value
    with pytest.raises(UserError, match=f"^{name} is .*: it has to be "):
        from_dict(Config, values)


def test_a_section_is_a_table_of_fields():
    for value in (None, 3, "scenes", [1]):
        with pytest.raises(UserError, match="^tokenizer is .*: it has to be a TokenizerConfig"):
            from_dict(Config, to_dict(RECIPES["tiny"]) | {"tokenizer": value})
        with pytest.raises(
            UserError, match="^the configuration is .*: it has to be a table of fields"
        ):
            from_dict(TokenizerConfig, value)


def test_a_range_says_itself():
    assert str(Range(0)) == "at least 0" and str(Range(0, without=0)) == "above 0"
    assert (
        str(Range(0, 1)) == "at least 0 and at most 1"
        and str(Range(0, 1, without=1)) == "at least 0 and below 1"
    )
    with pytest.raises(
        UserError, match=r"^tau is 0.0: it has to be at least 1e-06 \(a finite number\)\.$"
    ):
        ObjectiveConfig(tau=0.0)
    with pytest.raises(
        UserError, match="^bridge is 'sofd': it has to be one of 'soft', .*Did you mean 'soft'"
    ):
        ObjectiveConfig(bridge="sofd")
    with pytest.raises(UserError, match="it has to be a tuple of 2"):
        check_value("pair", (1, 2, 3), tuple[int, int])


TINY = RECIPES["tiny-joint"]


@pytest.mark.parametrize("build, message", [
    (lambda: replace(TINY.generator, heads=3), "width 32 over 3 heads: .*divisible by 4"),
    (lambda: replace(TINY.generator, tap_layer=4), "tap_layer is 4: it has to be at most 3, the number of layers"),
    (lambda: replace(TINY.generator, text_slots=4, dual_layers=4), "dual_layers is 4: it has to be at most 3"),
    (lambda: replace(TINY.generator, dual_layers=1), "dual_layers is 1: without text_slots"),
    (lambda: replace(TINY, generator=replace(TINY.generator, text_slots=4)), "text_slots is 4: .*conditioned on classes"),
    (lambda: replace(TOKENIZER, channel_mult=()), "channel_mult is empty"),
    (lambda: replace(TOKENIZER, res_blocks=0), "res_blocks is 0: every value of channel_mult has to be 1"),
    (lambda: replace(TOKENIZER, quantizer="lfq"), "every pattern of 4 signs .code_dim.: .*2..4, not 32"),
    (lambda: replace(TOKENIZER, quantizer="lfq", code_dim=MOST), "every pattern of 1000000000 signs"),
    (lambda: replace(TOKENIZER, init_from_data=True), "set linear_skip too"),
    (lambda: replace(TINY.tokenizer, code_dim=1), "code_dim is 1: init_from_data needs 2 to 49 channels"),
    (lambda: replace(TINY.tokenizer, code_dim=50), "code_dim is 50: init_from_data needs 2 to 49 channels"),
    (lambda: replace(TINY, data=replace(TINY.data, image_size=30)), "30 x 30 is not divisible by .* downsampling 4"),
    (lambda: replace(TINY, data=replace(TINY.data, image_size=8)), "disc_layers is 2: .*images of 8 px do not leave"),
    (lambda: replace(TINY, objective=replace(TINY.objective, disc_layers=4)), "disc_layers is 4: .*images of 32 px"),
    (lambda: replace(RECIPES["scenes-lfq-gear"], data=replace(TINY.data, image_size=4)), "image_size is 4: .*two tokens"),
    (lambda: recipe("tiny-s-1"), "seed is -1: it has to be at least 0 and at most 4,294,967,295"),
    (lambda: recipe("tiny-s4294967296"), "seed is 4294967296"),
    (lambda: recipe("tiny-s01"), "unknown recipe 'tiny-s01'. Did you mean 'tiny'"),
    (lambda: plan(replace(TINY, generator=replace(TINY.generator, num_classes=5)), base=TINY), "num_classes is 5: .* have 24"),
])  # fmt: skip
def test_rules_between_fields(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_values_that_the_rules_leave_free():
    """Valid values that earlier versions refused or crashed on: odd widths, a tap layer before the
    first layer, a discriminator of another size.
    """
    for channels in (1, 9, 10, 136):
        assert replace(TOKENIZER, channels=channels).channels == channels
    assert replace(TINY.generator, tap_layer=0).tap_layer == 0 and recipe("tiny-s0").seed == 0
    other = replace(TINY, objective=replace(TINY.objective, disc_channels=9))
    # the joint stage continues training the warm-up's discriminator
    warm_up, joint = (config for _, config in plan(other, label="nine"))
    assert warm_up.objective.disc_channels == joint.objective.disc_channels == 9
    both = replace(
        TINY,
        data=replace(TINY.data, image_size=36),
        tokenizer=replace(TINY.tokenizer, channel_mult=(1, 2, 2)),
    )
    assert [config.data.image_size for _, config in plan(both, label="both")] == [36, 36]


# -- numbers that are not fields of a class --------------------------------------------------------


def test_every_number_of_every_notebook_has_a_range():
    for name in render.notebooks():
        known = {
            key: value["inferred_type_name"]
            for key, value in parameters_of(render.notebooks()[name]).items()
        }
        assert {key for key, kind in known.items() if kind in ("int", "float")} <= RANGES.keys(), (
            name
        )
        for key in known.keys() & READ.keys():
            assert known[key] == "str"


@pytest.mark.parametrize("notebook, key, values", [
    ("probe", "tau", (NAN, "nan", 0, -1, "inf")), ("probe", "k", (0, -1)), ("probe", "count", (1, 0, -5)),
    ("probe", "image_size", (0, -1)), ("fig5_generator_alignment", "images", (0, -1)), ("tab4_tokenizer_alignment", "k", (0, -3)),
    ("fig3_training_dynamics", "window", (0, -1)), ("runs", "smooth", (-1, "nan", "inf")), ("bridges", "images", (0,)),
    ("tab1_system_comparison", "cfg_scale", ("nan", -1, "inf")), ("fig1_convergence", "count", (1, -1)), ("tour", "cfg_scale", ("nan",)),
    ("tab5_13_ablations", "seeds", ("-1", "0,x", "", "4294967296", "0,1.5", "nan")), ("fig1_convergence", "at", ("0", "50,-1", "x", "nan")),
    ("tab14_19_guidance", "scales", ("1,nan", "-1", "", "1;2")), ("train", "device", ("gpu", "cuda:99", "")),
])  # fmt: skip
def test_a_notebooks_value_out_of_range_is_refused_before_it_runs(notebook, key, values, home):
    for value in values:
        with pytest.raises(UserError, match=f"^notebook '{notebook}', parameter '{key}'"):
            render.execute(notebook, {key: value})
    assert not (home / "figures").exists()


def test_papermill_itself_is_held_to_the_ranges():
    with pytest.raises(UserError, match="parameter 'tau': tau is nan"):
        render.check_parameters({"__annotations__": {"tau": float}, "tau": NAN, "In": []})


def test_lists_of_numbers_and_seeds():
    assert seeds_of("2,0,2") == [0, 2] and read_numbers(
        "at", " 1, 2", Annotated[int, Range(1)]
    ) == [1, 2]
    for text in ("", "a", "0,,1", "-1", "1.5", "nan", "4294967296", "9" * 5000):
        with pytest.raises(UserError, match="^seeds (is|are) "):
            seeds_of(text)


@pytest.fixture
def record(home):
    """A run without weights: an error for a wrong value comes before any weights are read."""
    return recorded("tiny-joint", RECIPES["tiny-joint"])


@pytest.mark.parametrize("call, message", [
    (lambda run: profiles.layer_profile(run, 40, 0), "with 64 tokens an image: k is 0"),
    (lambda run: profiles.layer_profile(run, 40, 63), "k is 63: it has to be at least 1 and at most 62"),
    (lambda run: profiles.tokenizer_profile(run, 40, NAN), "k is nan: it has to be a whole number"),
    (lambda run: profiles.tokenizer_profile(run, 10, 10), "images is 10: it has to be at least 11"),
    (lambda run: profiles.layer_profile(run, 3, 1), "images is 3: it has to be at least 4"),
    (lambda run: profiles.alignment_floors(run, 0), "per_class is 0"),
    (lambda run: calibration.layer_calibration(run, 3, 1), "images is 3: it has to be at least 4"),
    (lambda run: calibration.layer_calibration(run, 40, 5, draws=0), "draws is 0"),
    (lambda run: calibration.layer_calibration(run, 40, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: probes.probes(run, 7), "images is 7: it has to be at least 8"),
    (lambda run: probes.probes(run, NAN), "images is nan: it has to be a whole number"),
    (lambda run: probes.probes(run, 40, device="gpu"), "no device 'gpu' here"),
    (lambda run: generator_sensitivity(run, 15, 5), "images is 15: it has to be at least 16"),
    (lambda run: tokenizer_sensitivity(run, 16, -1), "k is -1"),
    (lambda run: protocol_sensitivity(run, 7), "count is 7: it has to be at least 8"),
    (lambda run: profiles.layer_profile(run, 40, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: profiles.tokenizer_profile(run, 40, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: profiles.alignment_floors(run, 40, device="gpu"), "no device 'gpu' here"),
    (lambda run: generator_sensitivity(run, 16, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: tokenizer_sensitivity(run, 16, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: protocol_sensitivity(run, 8, device="gpu"), "no device 'gpu' here"),
    (lambda run: probe.probe_tokenizer(None, None, 0.1, None, 5, device="gpu"), "no device 'gpu' here"),
    (lambda run: results.quality([run], Scoring(1)), "count is 1"),
    (lambda run: results.quality([run], 100, scales=(1.0, NAN)), "cfg_scale is nan"),
    (lambda run: results.quality([run], 100, steps=(0,)), "steps is 0"),
    (lambda run: results.results("depth", "tiny", (-1,), 100), "seed is -1"),
    (lambda run: results.results("depth", "tiny", (0,), Scoring(-1)), "count is -1"),
    (lambda run: probe.load_images(TINY.data, -5), "count is -5"),
    (lambda run: probe.probe_tokenizer(None, None, NAN, None, 5), "tau is nan"),
    (lambda run: probe.probe_tokenizer(None, None, INF, None, 5), "tau is inf"),
    (lambda run: probe.teacher_targets("", TINY.data, None, [4], 2.5), "k is 2.5: it has to be a whole number"),
    (lambda run: Compare("tiny*", smooth=NAN), "smooth is nan"),
    (lambda run: samples(None, None, (8, 8), ["a"], cfg_scale=-1), "cfg_scale is -1"),
    (lambda run: train_many(["tiny-tokenizer"], 0, Runtime(device="cpu")), "jobs is 0"),
    (lambda run: train_many(["tiny"], 1, Runtime(device="gpu")), "no device 'gpu'"),
    (lambda run: sweep("depth", "tiny", (0,), runtime=Runtime(device="gpu"), tell=print), "no device 'gpu'"),
    (lambda run: train(TINY, "new", Runtime(device="gpu")), "no device 'gpu'"),
    (lambda run: train(TINY, "tiny-joint", Runtime(device="meta")), "no device 'meta'"),
])  # fmt: skip
def test_functions_that_take_a_number_or_a_device(call, message, record):
    before = sorted(record.path.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        call(Run.open("tiny-joint"))
    assert sorted(record.path.parent.rglob("*")) == before


def test_devices(monkeypatch):
    assert str(find_device("cpu")) == "cpu" and str(open_device("auto")) == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    for name in ("gpu", "", "meta", "cpu:0", "cuda:-1", "CPU", "cuda:99", "mps", " cpu", None):
        with pytest.raises(UserError, match=f"no device '{name}' here: there is auto, cpu"):
            open_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = {name: str(find_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")}
    assert devices == {"auto": "cuda", "cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}
    with pytest.raises(
        UserError, match="no device 'cuda:2' here: there is auto, cpu, cuda, cuda:0, cuda:1"
    ):
        find_device("cuda:2")


# -- the command line ------------------------------------------------------------------------------

COMMANDS = {
    "train tiny --tau 0 --label t": "tau is 0.0: it has to be at least 1e-06",
    "train tiny --tau -0.1 --label t": "tau is -0.1",
    "train tiny --tau nan --label t": "tau is nan",
    "train tiny --heads 0 --label v": "heads is 0",
    "train tiny --codebook-size 0 --label v": "codebook_size is 0",
    "train tiny --align-weight nan --label v": "align_weight is nan",
    "train tiny --dropout 2 --label v": "dropout is 2.0: it has to be at least 0 and below 1",
    "train tiny --class-dropout nan --label v": "class_dropout is nan",
    "train tiny --class-dropout -0.5 --label v": "class_dropout is -0.5",
    "train tiny --channel-mult 1 0 2 --label v": "channel_mult is 0",
    "train tiny --beta2 1": "beta2 is 1.0: it has to be at least 0 and below 1",
    "train tiny --clip inf": "clip is inf",
    "train tiny --tokenizer-ema 1.5": "tokenizer_ema is 1.5",
    "train tiny --steps 10000000": "steps is 10000000: it has to be at least 1 and at most 9,999,999",
    "train tiny --num-classes 7": "num_classes is 7: the images have 24 classes",
    "train tiny --disc-layers 9 --label v": "disc_layers is 9",
    "train tiny --seed -1": "seed is -1: it has to be at least 0 and at most 4,294,967,295",
    "train tiny --seed 99999999999999999999": "seed is 99999999999999999999",
    "train tiny-s1 --seed 2": "--seed 2: 'tiny-s1' names a seed already",
    "train tiny-s-1": "seed is -1",
    "train tiny --device gpu": "no device 'gpu' here: there is auto, cpu",
    "train tiny tiny-joint --device gpu": "no device 'gpu' here",
    "train tiny --threads -1": "threads is -1",
    "train tiny tiny-joint --jobs 0": "jobs is 0: it has to be at least 1",
    "train tiny --dry-run --utilisation nan": "utilisation is nan: it has to be above 0 and at most 1",
    "train tiny --dry-run --accumulate 3": "accumulate is 3: it has to divide batch_size, which is 16",
    "sweep depth --preset tiny --seeds -1": "--seeds: seeds is -1",
    "sweep depth --preset tiny --seeds 0,x": "--seeds: seeds are '0,x': numbers separated by commas",
    "sweep depth --preset tiny --count 1": "count is 1: a score needs at least two samples",
    "sweep depth --preset tiny --jobs -1": "jobs is -1",
    "sweep depth --preset tiny --device gpu": "no device 'gpu' here",
    "sample tiny --seed -1": "seed is -1",
    "sample tiny --seed 99999999999999999999": "seed is 99999999999999999999",
    "sample tiny --cfg-scale -1": "cfg_scale is -1.0: it has to be at least 0",
    "sample tiny --cfg-scale nan": "cfg_scale is nan",
    "sample tiny --temperature nan": "temperature is nan",
    "sample tiny --top-p 1.5": "top_p is 1.5",
    "sample tiny --grid -1": "grid is -1",
    "evaluate tiny --seed -1": "seed is -1",
    "evaluate tiny --seed 20000000000000000": "seed is 20000000000000000",
    "evaluate tiny --count 1": "count is 1",
    "evaluate tiny --cfg-scale -0.5": "cfg_scale is -0.5",
    "evaluate tiny --reference-count -1": "reference_count is -1",
    "evaluate tiny --steps 0": "steps is 0",
    "evaluate tiny-joint --sweep cfg_scale=1,nan": "--sweep cfg_scale=1,nan: cfg_scale is nan",
    "evaluate tiny-joint --sweep cfg_scale=-1": "cfg_scale is -1.0",
    "evaluate tiny-joint --sweep seed=0,-1": "seed is -1",
    "evaluate tiny-joint --sweep count=1.5": "is no list of numbers for count",
    "evaluate tiny-joint --device gpu": "no device 'gpu' here",
    "evaluate tiny-joint --device cuda:99": "no device 'cuda:99' here",
    "reconstruct tiny --count 0": "count is 0",
    "reconstruct tiny --image-size -32": "image_size is -32",
    "figures probe --seeds -1": "--seeds: seeds is -1",
    "figures probe --jobs 0": "jobs is 0",
    "figures probe -p tau nan": "tau is nan",
    "figures probe -p count 0": "count is 0",
    "figures tour -p cfg_scale -1": "cfg_scale is -1.0",
    "figures train -p device gpu": "no device 'gpu' here",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_with_one_message_and_writes_nothing(command, record, home, capsys):
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("gear: ") and error.count("\n") == 1, error
    assert COMMANDS[command] in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    assert [path.name for path in (home / "runs").iterdir()] == ["tiny-joint"] and not (
        home / "figures"
    ).exists()


def test_help_still_says_what_a_field_means(capsys):
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "guidance temperature of the soft read-out" in text
    assert "largest norm of a network's gradient" in text


def test_auto_is_a_device_of_an_evaluation_and_guidance_below_one_is_scored_as_such(tiny):
    few = (
        "--count 16 --network scenes --metrics fd_scenes --reference-count 30 --quiet --device auto"
    )
    main(["evaluate", "tiny", *few.split(), "--sweep", "cfg_scale=0,0.5,1"])
    records = [
        record for record in read_metrics(Run.open("tiny")) if record["metric"] == "fd_scenes"
    ]
    assert [record["protocol"]["cfg_scale"] for record in records] == [0.0, 0.5, 1.0]
    assert len({record["value"] for record in records}) == 3


@pytest.mark.parametrize("seed", (0, 2**32 - 1))
def test_both_ends_of_the_seeds_train_and_sample(seed, home):
    config = replace(RECIPES["tiny-joint-no-init"], seed=seed, steps=1, batch_size=2, eval_images=2)
    config = replace(config, data=replace(config.data, train_images=64, val_images=4))
    train(config, "ends", Runtime(device="cpu", quiet=True))
    main(["sample", "ends", "--seed", str(seed), "--labels", "0", "--out", str(home / "out.png")])
    assert (home / "out.png").exists()
