"""A dry run's numbers agree with formulas, with the networks' known sizes and with a real step; and
it changes nothing.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gear.__main__ import main
from gear.config import UserError
from gear.cost import counts, price
from gear.cost.dry_run import dry_run
from gear.experiments.presets import change
from gear.experiments.recipes import RECIPES, plan, recipe
from gear.generator.config import GENERATORS
from gear.tokenizer.config import TOKENIZERS
from gear.training.stages import STAGES
from gear.training.state import State

L, K = 256, 16_384


def linear(config, layers):
    """Return the FLOPs per image of the matrices in `layers` blocks: four of D x D in attention,
    three of D x F in the feed-forward network.
    """
    hidden = {768: 2048, 1024: 2816, 1280: 3584}[config.width]
    return layers * 2 * L * (4 * config.width**2 + 3 * config.width * hidden)


def attention(config, layers):
    return (
        layers * 2 * 2 * L**2 * config.width
    )  # the product q k and its product with v, over all pairs of positions


def passes(name):
    """Return the passes of a recipe: {(update, part): Pass}."""
    return {(p.update, p.part): p for p in price.price(RECIPES[name]).passes}


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_generator_against_its_formula(size):
    config = GENERATORS[size]
    head, recipe_passes = 2 * L * config.width * K, passes(f"imagenet256-{size.lower()}-joint")
    training, guidance = (
        recipe_passes["generator", "generator"].count,
        recipe_passes["tokenizer", "guidance"].count,
    )
    products, pairs = linear(config, config.layers) + head, attention(config, config.layers)
    assert training.forward == products + pairs
    assert training.backward == 2 * products + 2.5 * pairs  # fused attention recomputes q k
    products, pairs = linear(config, config.tap_layer), attention(config, config.tap_layer)
    assert guidance.forward == products + pairs
    assert guidance.backward == products + 2.5 * pairs  # the gradient of the input only
    readout = recipe_passes["tokenizer", "read-out"].count
    assert readout.forward == 2 * L * K * (
        config.width + 8
    )  # A, from codes of eight dimensions, is recomputed
    assert readout.backward == 2 * L * K * (
        config.width + 3 * 8
    )  # recomputed once more; latents and codes each get a gradient


def test_projector_discriminator_and_quantizer_against_their_formulas():
    recipe_passes = passes("imagenet256-l-joint")
    weights = 1024 * 2048 + 2048**2 + 2048 * 768
    assert recipe_passes["generator", "projector"].count[:2] == (2 * L * weights, 4 * L * weights)
    assert recipe_passes["tokenizer", "projector"].count[:2] == (2 * L * weights, 2 * L * weights)
    convolutions = [
        (3, 64, 128),
        (64, 128, 64),
        (128, 256, 32),
        (256, 512, 31),
        (512, 1, 30),
    ]  # from, to, side of the output
    forward = sum(2 * a * b * 16 * side**2 for a, b, side in convolutions)
    judged, trained = (
        recipe_passes[update, "discriminator"] for update in ("tokenizer", "discriminator")
    )
    assert (
        judged.count.forward == trained.count.forward == forward
        and judged.count.backward == forward
    )
    first = 2 * 3 * 64 * 16 * 128**2  # the gradient of the image is not needed
    assert trained.count.backward == 2 * forward - first and trained.training == 2 * (
        3 * forward - first
    )
    assert recipe_passes["tokenizer", "quantizer"].count[:2] == (
        2 * L * K * 8,
        6 * L * K * 8,
    )  # A once in the forward pass, three products in the backward pass
    assert (
        recipe_passes["tokenizer", "quantizer"].precision
        == recipe_passes["tokenizer", "read-out"].precision
        == "float32"
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("imagenet256-b-joint", {"generator": 110_888_448, "projector": 7_344_896}),
        (
            "imagenet256-l-joint",
            {"generator": 342_910_976, "projector": 7_869_184, "teacher": 86_579_712},
        ),
        ("imagenet256-xl-joint", {"generator": 774_699_520, "projector": 8_393_472}),
    ],
)
def test_parameters_are_the_known_ones(name, expected):
    parameters = price.price(RECIPES[name]).parameters
    assert expected.items() <= parameters.items()
    assert parameters["encoder"] + parameters["quantizer"] + parameters["decoder"] == 71_883_403


@pytest.mark.parametrize("kind, expected", [("lfq", 115_094_033), ("ibq", 110_982_019)])
def test_the_other_tokenizers_have_their_known_sizes(kind, expected):
    config = RECIPES[f"imagenet256-l-{kind}-joint"]
    assert config.tokenizer == TOKENIZERS[f"{kind.upper()}-16"]
    parameters = [
        counts.parameters(*work)
        for part in ("encoder", "quantizer", "decoder")
        for work in price.works(config)[part]
    ]
    assert sum(parameters) == expected


@pytest.mark.parametrize("name", ["tiny-tokenizer", "tiny-joint", "tiny", "scenes-joint-naive"])
def test_a_real_step_does_as_much(name, tiny):
    """The FLOPs counted while a step trains equal those of the price."""
    config = RECIPES[name]
    if name.startswith("scenes"):
        config = change(recipe("tiny-joint"), dict(objective=dict(bridge="naive")))
    config = change(config, dict(objective=dict(gan_start=0.0)))
    state = State(config, torch.device("cpu"))
    size = config.data.image_size
    images, labels = torch.rand(4, 3, size, size) * 2 - 1, torch.zeros(4, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=counts.UNCOUNTED) as counter:
        batch = state.observe(images, labels)
        for update in STAGES[config.stage].updates:
            update(state, batch)
    assert counter.get_total_flops() / 4 == pytest.approx(
        sum(p.training for p in price.price(config).passes), rel=1e-3
    )
    network_sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in state.networks.items()}
    parameters = price.price(config).parameters
    assert (
        network_sizes["tokenizer"]
        == parameters["encoder"] + parameters["quantizer"] + parameters["decoder"]
    )
    assert all(parameters[part] == n for part, n in network_sizes.items() if part != "tokenizer")


def test_a_real_step_keeps_as_much(tiny):
    """The activations that autograd saves in the tokenizer's update of a joint step, as the
    difference of eight and four images, equal those of the price.
    """
    config, sizes = change(recipe("tiny-joint"), dict(objective=dict(gan_start=0.0))), []
    for n in (4, 8):
        state, storages = State(config, torch.device("cpu")), {}

        def save(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            STAGES["joint"].updates[0](
                state, state.observe(torch.zeros(n, 3, 32, 32), torch.zeros(n, dtype=torch.long))
            )
        sizes.append(sum(storage.nbytes() for storage in storages.values()))
    assert (sizes[1] - sizes[0]) / 4 == pytest.approx(price.price(config).saved, rel=0.05)


def test_a_deep_generator_is_its_blocks():
    config = replace(GENERATORS["B"], layers=5, tap_layer=4)
    for tap, soft, mode in ((None, False, "train"), (4, True, "fixed")):
        arguments = (config, 64, 4, tap, soft)
        assert counts.count(counts.generator, arguments, mode, "bf16") == counts._image(
            counts.generator, arguments, mode, "bf16"
        )


def test_memory_grows_with_the_batch_and_bf16_keeps_less():
    bf16 = price.price(RECIPES["imagenet256-b-joint"])
    float32 = price.price(replace(RECIPES["imagenet256-b-joint"], precision="float32"))
    sizes = [bf16.memory(n) for n in (1, 2, 16, 256)]
    assert sizes == sorted(sizes) and sizes[0] > bf16.held
    assert 0.4 * float32.saved < bf16.saved < 0.8 * float32.saved
    assert [p.training for p in bf16.passes] == [p.training for p in float32.passes]
    fit = bf16.images_that_fit(80e9)
    assert bf16.memory(fit) <= 0.9 * 80e9 < bf16.memory(fit + 1)
    assert float32.hours(1, "h100", 0.4) > bf16.hours(1, "h100", 0.4) == bf16.hours(2, "h100", 0.8)


def test_a_dry_run_needs_and_leaves_nothing(home, capsys, monkeypatch):
    """It needs no images and no weights, writes no run folder, and leaves torch's random generator
    unchanged.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(home)
    before = torch.get_rng_state()
    main(
        [
            "train",
            "imagenet100-128-gear-s3",
            "--dry-run",
            "--gpu",
            "rtx4090",
            "--utilisation",
            "0.2",
        ]
    )
    output = capsys.readouterr().out
    for name in ("tokenizer", "joint", "gear"):
        assert f"imagenet100-128-{name}-s3: stage " in output
    assert (
        "num_classes 100" in output
        and "rtx4090, 24 GB: that does not fit" in output
        and ": --accumulate 2" in output
        and "20% is assumed" in output
    )
    assert "estimate" in output and output.endswith("nothing was trained\n")
    assert torch.equal(before, torch.get_rng_state()) and list(home.iterdir()) == []


def test_classes_are_those_of_a_folder_that_is_there(home, capsys):
    for name in "abc":
        (home / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (home / "photos" / name / f"{i}.png").write_bytes(b"")
    main(
        [
            "train",
            "tiny",
            "--source",
            str(home / "photos"),
            "--label",
            "photos",
            "--dry-run",
            "--gpu",
            "cpu",
        ]
    )
    output = capsys.readouterr().out
    assert output.count("num_classes 3") == 3 and "tiny-joint-photos: stage joint" in output
    assert "hours on a cpu: not known" in output and "all on one" not in output


def test_what_is_finished_costs_nothing(tiny, capsys):
    (tiny / "tiny" / "checkpoints" / "0000024").rename(tiny / "gone")
    main(["train", "tiny", "--dry-run"])
    output = capsys.readouterr().out
    assert (
        "tiny-tokenizer: finished" in output
        and "tiny-joint: finished" in output
        and "tiny: stage generator" in output
    )


def test_a_batch_in_parts_takes_less(home, capsys):
    main(["train", "imagenet100-128-tokenizer", "--dry-run", "--accumulate", "4"])
    assert "GB held + 32 images x " in capsys.readouterr().out


def test_several_runs_share_their_parents(home, capsys):
    main(["train", "tiny", "tiny-joint", "--dry-run"])
    assert capsys.readouterr().out.count("tiny-joint: stage") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu", "h10"], "unknown GPU 'h10'. Did you mean 'h100'?"),
        (["--utilisation", "0"], "utilisation is 0.0"),
        (["--image-size", "250"], "not divisible"),
        (["--teacher", "dinov2-x", "--label", "x"], "unknown teacher 'dinov2-x'"),
        (
            ["--teacher", "siglip2-b", "--image-size", "224", "--label", "x"],
            "cannot match the grid",
        ),
    ],
)
def test_mistakes_are_found(options, message, home, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                "imagenet256-l-tokenizer"
                if "--image-size" in options[:1]
                else "imagenet256-l-joint-no-init",
                *options,
                "--dry-run",
            ]
        )
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_training_without_the_images_says_what_to_give(home, capsys):
    with pytest.raises(SystemExit):
        main(["train", "imagenet256-l-gear-s0"])
    message = capsys.readouterr().err
    assert (
        "--source: there are no images at 'imagenet'. A folder, a zip or tar shards of images is "
        "expected" in message
    )


QUICK = {
    "tiny",
    "scenes-gear",
    "imagenet256-l-gear",
    "imagenet256-l-joint-naive",
    "teacher-scenes",
    "detector-scenes",
}  # the rest: two minutes


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_every_recipe_has_a_price(name, home, capsys):
    dry_run(plan(RECIPES[name], dry=True))
    assert "all on one h100" in capsys.readouterr().out and list(home.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher",
    [
        "dinov2-l",
        "dinov3-b",
        "siglip2-b",
        "vjepa2-l",
        "vjepa2.1-b",
        "clip-l",
        "dinov2-b@8,siglip2-b",
    ],
)
def test_every_public_teacher_has_a_price(teacher):
    cost = price.price(replace(RECIPES["imagenet256-b-joint"], teacher=teacher))
    assert cost.parameters["teacher"] > 80e6 and cost.passes[0].count.forward > 40e9


def test_an_unknown_gpu_has_no_hours():
    with pytest.raises(UserError, match="Known: h100"):
        dry_run([], "h1000")


GIGABYTE = 1e9


@pytest.mark.parametrize(
    "images, room, parts",
    [(256, 256, 1), (256, 255, 2), (256, 60, 8), (6, 3, 2), (7, 6, 7), (8, 0, None)],
)
def test_a_batch_goes_in_as_few_parts_as_fit(images, room, parts):
    assert price.fewest_parts(images, room) == parts


def test_parts_are_chosen_from_the_memory_there_is():
    """Compiled code saves fewer activations, so that more images fit at once."""
    config = RECIPES["imagenet256-b-joint"]
    plain, compiled = (price.price(config, is_compiled) for is_compiled in (False, True))
    assert 0.65 * plain.saved < compiled.saved < 0.8 * plain.saved
    for cost in (plain, compiled):
        parts = price.parts_that_fit(config, 256, 80 * GIGABYTE, cost.is_compiled)
        assert cost.memory(256 // parts) <= 0.9 * 80 * GIGABYTE < cost.memory(2 * 256 // parts)
    assert price.parts_that_fit(config, 256, 1e15, True) == 1
    with pytest.raises(
        UserError,
        match=r"one image at once needs 5\.\d GB, but only 90% of 5\.0 GB can be used: take a smaller",
    ):
        price.parts_that_fit(config, 256, 5 * GIGABYTE, True)


def test_auto_parts_are_those_of_the_gpu(home, capsys):
    main(
        [
            "train",
            "imagenet100-128-tokenizer",
            "--dry-run",
            "--accumulate",
            "auto",
            "--gpu",
            "rtx4090",
        ]
    )
    output = capsys.readouterr().out
    assert "rtx4090, 24 GB: that fits" in output and "GB held + 64 images x " in output


def test_an_unknown_word_for_parts(home, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny", "--accumulate", "some"])
    assert stop.value.code == 2 and "accumulate" in capsys.readouterr().err
