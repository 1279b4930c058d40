"""One joint step at the public sizes gives the numbers of the public trainer's step.

When the numbers were recorded, the public quantizers, losses and order of updates, with gear's
layers, gave the same numbers: losses to 1e-6, norms of gradients to 4e-4, zeros and indices exactly.
The layers, indices and losses are also compared with recorded outputs of the public code
(parity/cases).
"""

import json

import pytest
from joint_step import GOLDEN, SIZES, measure
from test_parity import case

from gear.tokenizer import readout

WANT = json.loads(GOLDEN.read_text())
# Rounding errors are magnified in these terms: those of A, which is about 100 for LFQ and IBQ, by
# temperatures of 0.01 and 0.1; those of the reconstruction by BatchNorm over two images and by the
# kinks of leaky ReLUs. CPUs differ by up to 6e-3.
MAGNIFIED = {"entropy_loss", "soft_align_loss", "gan_loss", "encoder", "codebook", "decoder"}


def leaves(tree, *path):
    """Return {path: numbers} for all leaves of a tree of dictionaries."""
    if not isinstance(tree, dict):
        return {path: tree if isinstance(tree, list) else [tree]}
    branches = [leaves(branch, *path, key) for key, branch in tree.items()]
    return {leaf_path: numbers for branch in branches for leaf_path, numbers in branch.items()}


def allowed(path, expected):
    """Return the tolerance of each number at a path."""
    match path:
        case ("indices",):
            return [0] * len(expected)
        case ("losses", _):
            return [2e-6 + 1e-5 * abs(expected[0])]  # a mean of cosines is near zero
        case ("gradients" | "terms", name, *_):
            size = 1e-2 if name in MAGNIFIED else 1e-3
            return [
                size * expected[0],
                3 * size * expected[0],
            ]  # a recorded zero has to be exactly zero
        case ("moments", _):
            return [1e-4 * number for number in expected]
        case ("steps", _):
            length = expected[
                1
            ]  # Adam's first step is the sign of the gradient, and rounding decides some signs
            return [1e-4, 1e-4 * length, 0.1 * length]
        case ("averages", _):
            return [2e-5]  # of 1 - decay = 1e-4


@pytest.mark.parametrize(
    "name", ["vq16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lfq16", "ibq16"))]
)
def test_a_joint_step_is_what_it_was(name, monkeypatch):
    """VQ forms A as one matrix; LFQ and IBQ use blocks of rows, as all quantizers do at 256 px."""
    if name != "vq16":
        monkeypatch.setattr(readout, "WHOLE", 0)
        monkeypatch.setitem(readout.BLOCK, "cpu", 5 * 16_384)
    measured, expected = leaves(measure(name)), leaves(WANT[name])
    assert measured.keys() == expected.keys()
    faults = []
    for path, numbers in expected.items():
        triples = zip(measured[path], numbers, allowed(path, numbers), strict=True)
        if not all(abs(a - b) <= limit for a, b, limit in triples):
            faults.append(f"{' '.join(path)}: {measured[path]} instead of {numbers}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", SIZES)
def test_the_recorded_step_is_the_public_networks(name):
    """Compares the indices and the tokenizer's losses with recorded outputs of the public code."""
    recorded_losses, public = WANT[name]["losses"], case(name)
    assert WANT[name]["indices"] == public["indices"].flatten().tolist()
    recon_loss = (public["recon"] - public["x"]).abs().mean()
    for recorded, expected in (
        (recorded_losses["recon_loss"], recon_loss),
        (recorded_losses.get("codebook_loss", 0), public["vq_loss"]),
        (0.25 * recorded_losses.get("commit_loss", 0), public["commit_loss_scaled"]),
        (0.05 * recorded_losses["entropy_loss"], public["entropy_scaled"]),
    ):
        assert recorded == pytest.approx(expected.item(), rel=1e-5)


REACHES = {
    "recon_loss": {"encoder", "decoder"},
    "gan_loss": {"encoder", "decoder"},
    "codebook_loss": {"codebook"},
    "commit_loss": {"encoder"},
    "entropy_loss": {"encoder", "codebook"},
    "soft_align_loss": {"encoder", "codebook"},
    "disc_loss": {"discriminator"},
    "ntp_loss": {"generator"},
    "align_loss": {"generator", "projector"},
}
IBQ_REACHES = {  # through softmax(A), a gradient reaches every code
    "recon_loss": {"encoder", "codebook", "decoder"},
    "gan_loss": {"encoder", "codebook", "decoder"},
    "codebook_loss": {"encoder", "codebook"},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_recorded_gradients_are_those_of_algorithm_1(name):
    """Each term has a gradient to its own parts only, and the terms add up to the full gradient,
    which is clipped to 1.
    """
    recorded = WANT[name]
    reaches = REACHES | (IBQ_REACHES if name == "ibq16" else {})
    for term, gradients in recorded["terms"].items():
        moved = {part for part, (size, _) in gradients.items() if size}
        assert moved == reaches[term] & recorded["gradients"].keys(), term
    for part, (size, along) in recorded["gradients"].items():
        total = sum(gradients[part][1] for gradients in recorded["terms"].values())
        assert total == pytest.approx(along, abs=1e-4 * size), part
    for network, (mean, squares) in recorded["moments"].items():
        assert [mean, squares] == pytest.approx([0.1, 1e-3], rel=1e-3), network
    for part, average in recorded["averages"].items():
        assert average == pytest.approx(0.9999, abs=5e-5), part
