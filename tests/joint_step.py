"""The numbers of one joint step at the public sizes; `python tests/joint_step.py` records them again.

The setting is that of the public trainer: LlamaGen-B, a PatchGAN with BatchNorm, lambda 0.5, tau
0.1, tap layer 4 and K = 16,384, with two images of 64 px. Weights, the teacher's features and
DIRECTION are computed from their names alone (parity/weights.py), so that no file has to be stored.
The recorded numbers are in golden/joint_step.json.
"""

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from test_parity import case, state_dict
from weights import parity_normal

import gear
from gear.checkpoints import load_discriminator, open_checkpoint
from gear.data import DataConfig
from gear.generator.config import GENERATORS
from gear.generator.model import Projector
from gear.tokenizer.config import TOKENIZERS
from gear.training.settings import Config, ObjectiveConfig
from gear.training.stages import STAGES
from gear.training.state import State

GOLDEN = Path(__file__).parent / "golden" / "joint_step.json"
SIZES = {"vq16": "VQ-16", "lfq16": "LFQ-16", "ibq16": "IBQ-16"}
LARGEST = 16_384 * 768  # elements of the largest weight, the generator's head
DIRECTION = torch.from_numpy(parity_normal("joint_step.direction", (LARGEST,)))


class FixedTeacher(torch.nn.Module):
    """A teacher with the same features (B, 16, 768) for every batch: 64 px are 4 x 4 tokens."""

    dim, stride = 768, 16

    def grid(self, size):
        return size // self.stride

    def forward(self, images, check=True):
        return torch.from_numpy(parity_normal("joint_step.target", (len(images), 16, self.dim)))


def load_projector(path):
    """Load the first projector of a public file."""
    projector = Projector(GENERATORS["B"], FixedTeacher.dim)
    tensors = open_checkpoint(path).parts["projector"].tensors
    projector.load_state_dict({name.removeprefix("0."): tensor for name, tensor in tensors.items()})
    return projector


LOAD = {
    "tokenizer": gear.load_tokenizer,
    "generator": gear.load_generator,
    "projector": load_projector,
    "discriminator": load_discriminator,
}


def write_public(name, folder):
    """Write one file per network to `folder`, in the public layout."""
    layouts = (name, "llamagen_b", "projector_b_dinov2b", "discriminator")
    for network, layout in zip(LOAD, layouts, strict=True):
        torch.save(state_dict(layout), folder / f"{network}.pt")


def load_public(folder):
    """Load the files of `write_public`: {network: module}."""
    return {network: load(folder / f"{network}.pt") for network, load in LOAD.items()}


def build(name, folder):
    """Return the State of a joint run that starts from the public files, without weight averages."""
    config = Config(
        recipe="joint",
        stage="joint",
        steps=1,
        batch_size=2,
        data=DataConfig(image_size=64),
        tokenizer=TOKENIZERS[SIZES[name]],
        generator=replace(GENERATORS["B"], dropout=0, class_dropout=0, condition_rotation="zero"),
        objective=ObjectiveConfig(lpips_weight=0, align_weight=0.5, tau=0.1, disc_norm="batch"),
    )
    with mock.patch("gear.training.state.load_teachers", lambda *_: [FixedTeacher()]):
        state = State(config, torch.device("cpu"))
    for average in state.averages.values():
        average.module = None  # frees a gigabyte; averages are needed only after the step
    public = load_public(folder)
    for network in public:
        state.networks[network].load_state_dict(public[network].state_dict())
    return state


def parameters(networks):
    """Return {part: parameters}; the parts are three of the tokenizer, and the other networks."""
    tokenizer = networks["tokenizer"]
    modules = {
        "encoder": [tokenizer.encoder, tokenizer.quant_conv],
        "codebook": [tokenizer.quantizer],
        "decoder": [tokenizer.post_quant_conv, tokenizer.decoder],
    } | {name: [network] for name, network in networks.items() if name != "tokenizer"}
    parts = {part: [p for m in group for p in m.parameters()] for part, group in modules.items()}
    return {part: weights for part, weights in parts.items() if weights}  # LFQ has no codebook


def norm(tensors):
    """Return the norm of all elements of several tensors; 0 for none."""
    return torch.stack([t.norm() for t in tensors]).norm().item() if tensors else 0.0


def described(gradients):
    """Return [norm, component along DIRECTION] of a gradient.

    The component also depends on signs and positions of the elements, which the norm does not.
    """
    gradients = [g.flatten() for g in gradients if g is not None]
    return [norm(gradients), sum((g @ DIRECTION[: len(g)]).item() for g in gradients)]


def gradients_by_term(losses, weights, parts):
    """Return {loss term: {part: `described` weighted gradient}}; a frozen part has norm 0."""
    learning = {part: [p for p in ps if p.requires_grad] for part, ps in parts.items()}
    inputs = [p for ps in learning.values() for p in ps]
    terms = {}
    for term, loss in losses.items():
        weighted = weights.get(term, 1.0) * loss
        options = dict(retain_graph=True, allow_unused=True)
        remaining = iter(torch.autograd.grad(weighted, inputs, **options))
        by_part = {part: [next(remaining) for _ in ps] for part, ps in learning.items()}
        terms[term] = {part: described(gradients) for part, gradients in by_part.items()}
    return terms


def measure(name):
    """Take the step with the tokenizer `name`, as in training; returns a tree of numbers.

    gradients, terms: [norm, component along DIRECTION] per part.
    steps: [share of weights that changed, norm, component along DIRECTION] of the change.
    moments: [norm of Adam's first moment, sum of its second moment], which depend on clipping.
    averages: distance between average and new weights, divided by the norm of the change; this is
    the decay of the average.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_public(name, Path(folder))
        state = build(name, Path(folder))
        measured = descend(state, case(name)["x"], case("llamagen_b")["classes"])
        start = load_public(Path(folder))
    return measured | movement(state, start)


def descend(state, images, labels):
    """Take the step; returns indices, losses, gradients by part and by loss term, and moments."""
    parts = parameters(state.networks)
    terms = {}
    moments = {}
    backward = state.backward

    def backward_by_term(network, losses, weights):
        terms.update(gradients_by_term(losses, weights, parts))
        return backward(network, losses, weights)

    def forget_moments(network, adam, *_):
        states = list(adam.state.values())
        squares = sum(s["exp_avg_sq"].sum().item() for s in states)
        moments[network] = [norm([s["exp_avg"] for s in states]), squares]
        adam.state.clear()  # frees a gigabyte; there is no second step

    for network, optimizer in state.optimizers.items():
        forget = partial(forget_moments, network)
        optimizer.adam.register_step_post_hook(forget)
    with mock.patch.object(state, "backward", backward_by_term):
        for batch in state.batches(images, labels):
            for update in STAGES["joint"].updates:
                update(state, batch)
    gradients = {part: described([p.grad for p in ps]) for part, ps in parts.items()}
    return {
        "indices": batch.indices.flatten().tolist(),
        "losses": {term: loss.item() for term, loss in state.descend().items()},
        "gradients": gradients,
        "terms": terms,
        "moments": moments,
    }


def movement(state, start):
    """Return how the step changed weights and averages, both of which began as those of `start`."""
    parts = parameters(state.networks)
    before = parameters(start)
    steps = {}
    averages = {}
    for part, weights in parts.items():
        change = [p.detach() - q for p, q in zip(weights, before[part], strict=True)]
        changed = sum(c.count_nonzero().item() for c in change)
        steps[part] = [changed / sum(c.numel() for c in change), *described(change)]
    for network, average in state.averages.items():
        average.module = start[network]
    state.finish_step()
    for part in parts.keys() - {"projector", "discriminator"}:  # these two have no average
        lag = norm([p.detach() - q for p, q in zip(parts[part], before[part])])
        averages[part] = lag / steps[part][1]
    return {"steps": steps, "averages": averages}


def rounded(tree):
    """Round every float in a tree to seven significant digits; sorts the keys."""
    if isinstance(tree, dict):
        return {key: rounded(tree[key]) for key in sorted(tree)}
    if isinstance(tree, list):
        return [rounded(item) for item in tree]
    return float(f"{tree:.7g}") if isinstance(tree, float) else tree


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: rounded(measure(name)) for name in SIZES}, indent=1) + "\n")
