"""Tiny networks, configurations and images that several tests share."""

import contextlib
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gear import data
from gear.config import to_dict
from gear.data.scenes import Scenes
from gear.evaluation import judge
from gear.evaluation.scores import record
from gear.experiments.recipes import TINY, recipe
from gear.experiments.studies import members
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator
from gear.runs.run import Run
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer
from gear.tokenizer.quantize import SignAffinity
from gear.tokenizer.readout import Affinity
from gear.training.losses import QUANTIZER_LOSSES, entropy_loss
from gear.training.stages import gradients
from gear.training.state import State, step_seed

TOKENIZER = TokenizerConfig(
    codebook_size=32,
    code_dim=4,
    channels=8,
    channel_mult=(1, 2, 2),
    latent_channels=16,
    res_blocks=1,
)
GENERATOR = GeneratorConfig(
    width=16,
    layers=3,
    heads=2,
    num_classes=5,
    tap_layer=2,
    projector_dim=8,
    class_dropout=0.0,
    dropout=0.0,
)
K = 11  # the tiny generator's codebook


def scenes(count, first=0):
    """Return `count` scenes from number `first` on, at 32 px: images (N, 3, 32, 32) in [-1, 1] and
    labels (N,).
    """
    source = Scenes(first, count, 32)
    positions = np.arange(count)
    images = data.to_float(torch.from_numpy(source.images(positions)))
    return images, torch.from_numpy(source.labels(positions))


def stirred(module, std=0.3):
    """Give every matrix of a network large random weights, so that no head is zero and every block
    changes the output. Returns the network.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, std)
    return module


def tiny_tokenizer(**changes):
    torch.manual_seed(0)
    return Tokenizer(replace(TOKENIZER, **changes))


def tiny_generator(**changes):
    """Return a generator over K codes with stirred weights, in evaluation mode."""
    torch.manual_seed(0)
    return stirred(Generator(replace(GENERATOR, **changes), K)).eval()


def tiny_state(
    stage="joint",
    steps=24,
    stir=True,
    generator=(),
    teacher="scenes",
    tokenizer=(),
    batch_size=16,
    parts=1,
    checkpointing=False,
    **objective,
):
    """Return a State of the preset `tiny` without a parent, whose generator trains with dropout of
    activations and of labels.
    """
    torch.manual_seed(0)
    config = replace(
        TINY,
        recipe="test",
        stage=stage,
        steps=steps,
        tokenizer_run="",
        teacher=teacher,
        batch_size=batch_size,
        tokenizer=replace(TINY.tokenizer, **dict(tokenizer)),
        generator=replace(TINY.generator, dropout=0.5, class_dropout=0.5, **dict(generator)),
        objective=replace(TINY.objective, **{"gan_start": 0.0, **objective}),
    )
    state = State(config, torch.device("cpu"), parts, checkpointing=checkpointing)
    for name in {"generator", "projector"} & state.networks.keys() if stir else ():
        stirred(state.networks[name])
    return state


def loss_terms(quantized):
    """Return all unweighted loss terms of a Quantized: {name: scalar}."""
    if isinstance(quantized.affinity, SignAffinity):
        kind = "lfq"
    else:
        kind = "vq" if quantized.affinity.shift else "ibq"
    return QUANTIZER_LOSSES[kind](quantized) | {
        "entropy_loss": entropy_loss(*quantized.affinity.entropies())
    }


class Formed(Affinity):
    """An Affinity given by its matrix (..., K) alone."""

    def __init__(self, matrix):
        super().__init__(matrix, matrix.new_empty(matrix.shape[-1], 0), limit=2**62)
        self.dense = matrix


def weights(*modules):
    """Return copies of the weights of networks, for a later comparison."""
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(one, other):
    """Return whether two sequences of tensors are equal."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same_run(one, other):
    """Assert that two run directories hold the same metrics and the same newest checkpoint, byte
    for byte.
    """
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for file in ("networks.safetensors", "optimizers.safetensors", "state.json"):
        newest = sorted((one / "checkpoints").glob("0*"))[-1].name
        assert (one / "checkpoints" / newest / file).read_bytes() == (
            other / "checkpoints" / newest / file
        ).read_bytes()


def recorded(name, config, scores=(), **metrics):
    """Write a finished run without training it: its configuration, the last line of its log, and
    the records of an evaluation. Returns the Run.

    scores: a list of (step, cfg_scale, {metric: value}); step 0 means a reconstruction. metrics:
    the values that validation logged.
    """
    run = Run.create(name, to_dict(config))
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    run.append(
        {"step": config.steps, **{f"val/{metric}": value for metric, value in metrics.items()}}
    )
    base = {"network": "scenes", "weights_of": name}
    sample_protocol = base | {
        "count": 100,
        "seed": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "reference_count": 2_000,
    }
    sample_protocol["reference"] = config.data.source
    if "resolution" in str(name) or name.endswith("px"):  # the study resizes its samples
        sample_protocol["samples_resized"] = 32
    reconstruction_protocol = base | {
        "split": "val",
        "images": min(2_000, config.data.val_images),
        "step": config.steps,
    }
    records = [
        record(
            metric,
            value,
            sample_protocol | {"step": step, "cfg_scale": scale}
            if step
            else reconstruction_protocol,
        )
        for step, scale, values in scores
        for metric, value in values.items()
    ]
    loss_protocol = {
        "weights_of": name,
        "split": "val",
        "images": min(config.eval_images, config.data.val_images),
        "step": config.steps,
    }
    # Evaluations write these losses too, but only the values in the log count.
    records += [
        record(metric, 99.0, loss_protocol)
        for metric in ("ntp_loss", "usage_entropy", "predictable")
    ]
    (run.path / "metrics.json").write_text(json.dumps(records))
    return run


def record_study(name, preset="tiny", seeds=(0, 1, 2), effect=-1.0):
    """Write every run of a study with seeded random scores, without training; GEAR's Fréchet
    distances differ from the baseline's by `effect`. Returns the Members.
    """
    for member in members(name, preset, seeds):
        record_scored(member.name, member.planned[-1][1], effect if member.role == "gear" else 0.0)
    return members(name, preset, seeds)


def record_scored(name, config, effect=0.0):
    """Write a run with seeded random scores: of samples at two steps and three guidance scales, and
    of reconstructions. Returns the Run.
    """
    noise = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
    steps = [
        (step, scale) for step in (config.steps // 2, config.steps) for scale in (1.0, 1.5, 2.0)
    ]
    scores = [
        (
            step,
            scale,
            {
                "fd_scenes": 9 + effect - 4 * step / config.steps - scale + noise.uniform(0, 0.1),
                "precision": 0.5 + noise.uniform(0, 0.1),
                "recall": 0.4 + noise.uniform(0, 0.1),
            },
        )
        for step, scale in steps
    ]
    scores.append(
        (
            0,
            0,
            {
                "rfd_scenes": 2 + noise.uniform(0, 0.1),
                "psnr": 20 + noise.uniform(0, 0.1),
                "ssim": 0.6,
            },
        )
    )
    losses = {
        "ntp_loss": 3 + noise.uniform(0, 0.1),
        "align_loss": -0.5,
        "usage_entropy": 4.0,
        "psnr": 20.0,
    }
    return recorded(name, config, scores, **losses)


def record_judged(run, scales=(1.0, 3.0)):
    """Add to a run's scores what the detector says, seeded random numbers, and keep its sheets."""
    config = run.config
    noise = np.random.default_rng(config["seed"])
    records = run.scores()
    share = lambda: noise.uniform(0.1, 0.9)  # noqa: E731
    for step in (config["steps"] // 2, config["steps"]):
        for scale in scales:
            stated = {"step": step, "cfg_scale": scale}
            records.append(record("fd_detector", 1 + share(), stated))
            of = stated | {"of": "samples"}
            records += [record(f"judge_{k}", share(), of) for k in ("shape", "texture", "class")]
            sheet = run.path / "sheets" / f"{step:07d}-{scale:g}.png"
            sheet.parent.mkdir(exist_ok=True)
            pixels = noise.integers(0, 256, (2 * 34 + 2, 12 * 34 + 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(sheet)
        of = {"step": step, "of": "reconstructions"}
        records += [record(f"judge_{atom}", share(), of) for atom in judge.ATOMS]
    (run.path / "metrics.json").write_text(json.dumps(records))


def state_on(device, parts=1, checkpointing=False, **changes):
    """Return a State of the stage `joint` with stirred weights, which are the same on every device;
    its steps use no random numbers.
    """
    base = recipe("tiny-joint")
    without_dropout = replace(base.generator, dropout=0.0, class_dropout=0.0)
    objective = replace(base.objective, gan_start=0.0)
    config = replace(
        base,
        stage="joint",
        tokenizer_run="",
        generator=without_dropout,
        objective=objective,
        **changes,
    )
    torch.manual_seed(0)
    # Random numbers differ between devices: weights are drawn on the CPU and copied.
    on_cpu = State(config, torch.device("cpu"), parts, checkpointing=checkpointing)
    state = State(config, torch.device(device), parts, checkpointing=checkpointing)
    on_cpu.start(on_cpu.config.data)
    for name, network in on_cpu.networks.items():
        if name in ("generator", "projector"):
            stirred(network)
        state.networks[name].load_state_dict(network.state_dict())
        if name in state.averages:
            state.averages[name].module.load_state_dict(network.state_dict())
    return state


def take_step(state, images, labels):
    """Take one training step as gear.training.loop does; returns the losses."""
    torch.manual_seed(step_seed(0, state.step))
    gradients(state, (images, labels))
    losses = state.descend()
    state.finish_step()
    return losses


@contextlib.contextmanager
def no_waits(device):
    """Raise an error if the code inside the block waits for the GPU; skips the test on a CPU."""
    if device.type != "cuda":
        pytest.skip("only a GPU computes asynchronously")
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
