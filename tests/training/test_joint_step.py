"""One joint step at the public sizes gives the numbers of the public trainer's.

When they were recorded, the public quantizers, losses and order of updates, over these layers, gave
the same: losses to 1e-6, norms of gradients to 4e-4, zeros and indices exactly. For the layers, the
indices and the losses there are recorded outputs of the public code, too (parity/cases).
"""

import json

import pytest
from joint_step import GOLDEN, SIZES, measure
from test_parity import case

from gear.tokenizer import readout

WANT = json.loads(GOLDEN.read_text())
# |A| is about 100 for LFQ and IBQ: temperatures of .01 and .1 magnify its rounding. BatchNorm of
# two images and the kinks of leaky ReLUs magnify the reconstruction's. CPUs differ by up to 6e-3.
MAGNIFIED = {"entropy_loss", "soft_align_loss", "gan_loss", "encoder", "codebook", "decoder"}


def leaves(tree, *path):
    """Return {path: numbers} of a tree of dictionaries."""
    if not isinstance(tree, dict):
        return {path: tree if isinstance(tree, list) else [tree]}
    branches = [leaves(branch, *path, key) for key, branch in tree.items()]
    return {place: numbers for branch in branches for place, numbers in branch.items()}


def allowed(path, want):
    """Return by how much each number at a path may differ."""
    match path:
        case ("indices",):
            return [0] * len(want)
        case ("losses", _):
            return [2e-6 + 1e-5 * abs(want[0])]  # a mean of cosines is near zero
        case ("gradients" | "terms", name, *_):
            size = 1e-2 if name in MAGNIFIED else 1e-3
            return [size * want[0], 3 * size * want[0]]  # a norm of exactly zero has to be zero
        case ("moments", _):
            return [1e-4 * number for number in want]
        case ("steps", _):
            length = want[1]  # a first step of Adam is signs, and rounding decides some
            return [1e-4, 1e-4 * length, 0.1 * length]
        case ("averages", _):
            return [2e-5]  # of 1 - decay = 1e-4


@pytest.mark.parametrize(
    "name", ["vq16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lfq16", "ibq16"))]
)
def test_a_joint_step_is_what_it_was(name, monkeypatch):
    """VQ forms A whole, the others read it by blocks of rows, as all do at 256 px."""
    if name != "vq16":
        monkeypatch.setattr(readout, "WHOLE", 0)
        monkeypatch.setitem(readout.BLOCK, "cpu", 5 * 16_384)
    got, want = leaves(measure(name)), leaves(WANT[name])
    assert got.keys() == want.keys()
    faults = []
    for path, numbers in want.items():
        triples = zip(got[path], numbers, allowed(path, numbers), strict=True)
        if not all(abs(a - b) <= limit for a, b, limit in triples):
            faults.append(f"{' '.join(path)}: {got[path]} instead of {numbers}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", SIZES)
def test_the_recorded_step_is_the_public_networks(name):
    """Indices and each loss of the tokenizer against recorded outputs of the public code."""
    want, public = WANT[name]["losses"], case(name)
    assert WANT[name]["indices"] == public["indices"].flatten().tolist()
    recon_loss = (public["recon"] - public["x"]).abs().mean()
    for got, expected in (
        (want["recon_loss"], recon_loss),
        (want.get("codebook_loss", 0), public["vq_loss"]),
        (0.25 * want.get("commit_loss", 0), public["commit_loss_scaled"]),
        (0.05 * want["entropy_loss"], public["entropy_scaled"]),
    ):
        assert got == pytest.approx(expected.item(), rel=1e-5)


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
IBQ_REACHES = {  # softmax(A) carries a gradient to every code
    "recon_loss": {"encoder", "codebook", "decoder"},
    "gan_loss": {"encoder", "codebook", "decoder"},
    "codebook_loss": {"encoder", "codebook"},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_recorded_gradients_are_those_of_algorithm_1(name):
    """Each term moves its parts and no other; terms add up to the gradient, clipped to 1."""
    want = WANT[name]
    reaches = REACHES | (IBQ_REACHES if name == "ibq16" else {})
    for term, gradients in want["terms"].items():
        moved = {part for part, (size, _) in gradients.items() if size}
        assert moved == reaches[term] & want["gradients"].keys(), term
    for part, (size, along) in want["gradients"].items():
        total = sum(gradients[part][1] for gradients in want["terms"].values())
        assert total == pytest.approx(along, abs=1e-4 * size), part
    for network, (mean, squares) in want["moments"].items():
        assert [mean, squares] == pytest.approx([0.1, 1e-3], rel=1e-3), network
    for part, average in want["averages"].items():
        assert average == pytest.approx(0.9999, abs=5e-5), part
