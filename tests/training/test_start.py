"""A run starts from a public tokenizer's file, with the file's discriminator if it has one, as in
the paper, or from another run.
"""

from dataclasses import replace

import pytest
import torch
from joint_step import SIZES, state_dict
from PIL import Image

from gear.__main__ import main
from gear.checkpoints import load_tokenizer, tokenizer_start
from gear.config import UserError
from gear.experiments.presets import change
from gear.experiments.recipes import plan, recipe
from gear.runs.run import Run
from gear.tokenizer.config import TOKENIZERS
from gear.tokenizer.discriminator import Discriminator
from gear.training.loop import Runtime, train
from gear.training.objectives import frozen
from gear.training.state import State
from gear.weights import load_networks

QUIET = Runtime(device="cpu", quiet=True)
SLOW = pytest.mark.slow
LAYOUTS = ["vq16", pytest.param("lfq16", marks=SLOW), pytest.param("ibq16", marks=SLOW)]


def written(name, folder, **more):
    """Write a tokenizer with a discriminator, as stage 0 of the public GEAR code does."""
    path = folder / f"{name}.pt"
    parts = {"vq": state_dict(name), "discriminator": state_dict("discriminator")}
    torch.save(parts | {"steps": 7} | more, path)
    return path


@pytest.fixture
def photographs(home):
    """A folder of images in four colours, with two class folders."""
    for i, colour in enumerate(("red", "green", "blue", "white")):
        folder = home / "photographs" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for j in range(12):
            Image.new("RGB", (40, 40), colour).save(folder / f"{i}{j}.png")
    return home / "photographs"


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_run_from_a_public_file_would_cost(name, home, capsys):
    path = written(name, home)
    main(["train", "imagenet256-l-joint-s0", "--tokenizer-run", str(path), "--dry-run"])
    out = capsys.readouterr().out
    assert f"from {path}" in out and "imagenet256-l-tokenizer" not in out, (
        "there is no parent to train"
    )
    config = change(recipe("imagenet256-l-joint-s0"), dict(tokenizer_run=str(path)))
    ((_, planned),) = plan(config, "mine", dry=True)
    assert planned.tokenizer == TOKENIZERS[SIZES[name]] and planned.objective.disc_norm == "batch"


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_two_steps_of_warm_up_and_of_joint_training_from_a_public_file(name, home, photographs):
    """Both stages start with the file's tokenizer, its average and its discriminator."""
    path = written(name, home)
    few = dict(
        steps=2, batch_size=2, precision="float32", log_every=1, eval_images=2, eval_every=2,
        data=dict(source=str(photographs), image_size=32),
        generator=dict(width=32, layers=3, heads=2, tap_layer=1, projector_dim=16),
        objective=dict(lpips_weight=0.0, align_weight=0.0),
    )  # fmt: skip
    started, _ = tokenizer_start(path)
    for stage in ("tokenizer", "joint"):
        config = change(recipe(f"imagenet256-l-{stage}"), few | dict(tokenizer_run=str(path)))
        ((run, planned),) = plan(config, f"mine-{stage}")
        state = State(planned, torch.device("cpu"))
        for network, tensors in started.items():
            for key, value in state.modules[network].state_dict().items():
                assert torch.equal(value, tensors[key]), (network, key)
        trained = train(planned, run, QUIET)
        logged = trained.metrics().iloc[1:]
        terms = ["recon_loss", "gan_loss", "disc_loss"] + ["ntp_loss"] * (stage == "joint")
        assert logged[terms].notna().all().all() and len(logged) == 2
        moved = load_networks(trained)["tokenizer"]
        changed = [k for k, v in moved.items() if not torch.equal(v, started["tokenizer"][k])]
        assert len(changed) > 0.9 * len(moved)
    with pytest.raises(UserError, match="tokenizer_run: .*mine"):
        train(replace(planned, tokenizer_run="mine-tokenizer"), "mine-joint", QUIET)


@pytest.mark.slow
def test_a_warm_up_from_a_public_file_and_a_joint_run_from_that(home, photographs):
    """The paper's start in two commands: the joint run also takes the warm-up's discriminator."""
    path = written("vq16", home)
    few = dict(
        steps=1, batch_size=2, log_every=1, eval_images=2, eval_every=1, teacher="scenes",
        data=dict(source=str(photographs)), objective=dict(align_weight=0.0),
    )  # fmt: skip
    warm_up = change(recipe("tiny-tokenizer-s0"), few | dict(tokenizer_run=str(path)))
    ((_, planned),) = plan(warm_up, "tiny-tokenizer-s0-public")
    train(planned, "tiny-tokenizer-s0-public", QUIET)
    joint = change(recipe("tiny-joint-s0"), few | dict(tokenizer_run="tiny-tokenizer-s0-public"))
    ((_, planned),) = plan(joint, "tiny-joint-s0-public")
    assert planned.tokenizer == TOKENIZERS["VQ-16"]
    assert (planned.objective.disc_norm, planned.objective.disc_channels) == ("batch", 64)
    assert train(planned, "tiny-joint-s0-public", QUIET).is_finished


def test_a_frozen_start_asks_for_the_average_alone(home):
    """A generator can use a file's tokenizer even if the file's discriminator does not fit."""
    path = written("vq16", home, discriminator={"main.0.weight": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(UserError):
        tokenizer_start(path)
    assert tokenizer_start(path, frozen=True)[0].keys() == {"tokenizer_ema"}


def test_batch_norm_of_micro_batches_gives_a_warning(tiny, capsys):
    config = change(recipe("tiny-joint-no-init"), dict(objective=dict(disc_norm="batch"), steps=1))
    train(config, "parts", Runtime(device="cpu", accumulate=2))
    assert "BatchNorm sees each micro-batch alone" in capsys.readouterr().err
    train(
        replace(config, objective=recipe("tiny").objective),
        "group",
        Runtime(device="cpu", accumulate=2),
    )
    assert "BatchNorm" not in capsys.readouterr().err


@pytest.fixture
def exported(tiny, home):
    """The tokenizer of tiny-joint as a file."""
    main(["export", "tiny-joint", str(home / "tokenizer.safetensors")])
    return home / "tokenizer.safetensors"


def test_a_generator_on_a_file_is_that_on_the_run_it_came_from(tiny, home, exported):
    config = replace(recipe("tiny"), steps=2, eval_every=2)
    ((_, planned),) = plan(replace(config, tokenizer_run=str(exported)), "by-file")
    assert planned.tokenizer == config.tokenizer and planned.tokenizer_run == str(exported)
    train(planned, "by-file", QUIET)
    train(config, "by-run", QUIET)
    by_file, by_run = (Run.open(name) for name in ("by-file", "by-run"))
    assert by_file.metrics().equals(by_run.metrics())
    exported.unlink()
    train(replace(planned, steps=2), "by-file", QUIET)  # finished, so the file is not read


def test_a_file_without_a_discriminator_begins_with_a_fresh_one(tiny, home):
    tokenizer = load_tokenizer("tiny-joint")
    torch.save({f"{n}": t for n, t in tokenizer.state_dict().items()}, home / "x.pt")
    with pytest.raises(
        UserError, match="x.pt"
    ):  # no known layout, because only gear has a linear skip
        plan(replace(recipe("tiny-joint"), tokenizer_run=str(home / "x.pt")), "mine")
    public = {"vq": state_dict("vq16")}
    torch.save(public, home / "vq.pt")
    started, precision = tokenizer_start(home / "vq.pt")
    assert started.keys() == {"tokenizer", "tokenizer_ema"} and precision == "float32"
    assert all(torch.equal(started["tokenizer"][k], v) for k, v in started["tokenizer_ema"].items())
    config = change(recipe("imagenet256-l-joint"), dict(tokenizer_run=str(home / "vq.pt")))
    ((_, planned),) = plan(config, "mine", dry=True)
    assert planned.objective == config.objective, (
        "the discriminator is the recipe's, newly initialised"
    )


@pytest.mark.parametrize(
    "parent, message",
    (
        ("nowhere.pt", "--tokenizer-run: no checkpoint .*nowhere.pt: there is no such file"),
        ("folder/of.pt", "there is no such file"),
    ),
)
def test_a_file_that_is_not_there(parent, message, home):
    with pytest.raises(UserError, match=message):
        plan(replace(recipe("tiny-joint"), tokenizer_run=parent), "mine")
    assert not (home / "runs").exists()


def test_a_file_that_is_cut_short(home, exported, capsys):
    exported.write_bytes(exported.read_bytes()[:5000])
    with pytest.raises(SystemExit) as stopped:
        main(["train", "tiny-joint", "--tokenizer-run", str(exported), "--name", "mine"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "--tokenizer-run: " in err and "Traceback" not in err


def test_a_frozen_discriminator_sees_the_batchs_own_statistics():
    """With BatchNorm in evaluation mode, the tokenizer's adversarial gradient is wrong: its cosine
    with the right one was 0.56.
    """
    torch.manual_seed(0)
    discriminator = Discriminator(8, 2, "batch").train()
    for buffer in (b for n, b in discriminator.named_buffers() if n.endswith("running_var")):
        buffer.fill_(9.0)  # statistics that differ from the batch's
    images = torch.randn(4, 3, 32, 32)

    def gradient(compute):
        x = images.clone().requires_grad_()
        return torch.autograd.grad(compute(x), x)[0]

    expected = gradient(lambda x: discriminator(x).mean())
    with frozen(discriminator):
        assert discriminator.training and not any(
            p.requires_grad for p in discriminator.parameters()
        )
        assert torch.equal(gradient(lambda x: discriminator(x).mean()), expected)
    assert discriminator.training and all(p.requires_grad for p in discriminator.parameters())
    in_evaluation_mode = gradient(lambda x: discriminator.eval()(x).mean())
    assert torch.cosine_similarity(in_evaluation_mode.flatten(), expected.flatten(), 0) < 0.95, (
        "evaluation mode gives another gradient"
    )


def test_batch_norm_is_a_field(tiny):
    config = change(recipe("tiny-joint-no-init"), dict(objective=dict(disc_norm="batch"), steps=2))
    run = train(config, "batch", QUIET)
    assert any("running_mean" in name for name in load_networks(run)["discriminator"])
    with pytest.raises(UserError, match="disc_norm: 'batch' -> 'group'"):
        train(
            replace(config, objective=replace(config.objective, disc_norm="group")), "batch", QUIET
        )
