"""Tables of a run: what their levels mean, and the floors drawn beside them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import scenes

from gear import load_tokenizer
from gear.analysis import tables
from gear.analysis.features import tokenizer_features
from gear.run import Run
from gear.teachers.scenes import load_scenes_teacher

N, L, K = 40, 16, 5


def profile(rows, target):
    return tables.profile({0: rows}, target, K).set_index(["level", "metric"])


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, L, 6, generator=generator) for _ in range(3)]


def test_position_alone_aligns_patches_and_not_content(noise):
    """What only tells where a patch lies aligns any image with any other; without the position's mean nothing is left."""
    position = 3 * noise[2][:1]
    table = profile(position + noise[0], position + noise[1])
    assert table.value["patch", "cka"] > 0.7 and table.null["patch", "cka"] > 0.7
    assert abs(table.value["content", "cka"]) < 0.05 and abs(table.null["content", "cka"]) < 0.05


def test_content_is_not_touched_by_what_position_adds(noise):
    shared = noise[0] + 0.5 * noise[1]
    plain, shifted = profile(shared, noise[0]), profile(shared + 5 * noise[2][:1], noise[0])
    assert shifted.value["content", "cka"] == pytest.approx(plain.value["content", "cka"], abs=1e-5)
    assert plain.value["content", "cka"] > 0.5 > plain.null["content", "cka"]
    assert shifted.value["patch", "cka"] < plain.value["patch", "cka"] - 0.1


def test_a_collapsed_tokenizer_is_undefined_not_an_error(noise):
    table = profile(torch.ones(N, L, 6) + noise[2][:1], noise[0])  # one answer at every position, whatever the image
    assert table.n["content", "cka"] == 0
    assert table.value.loc[[("content", "cka"), ("content", "cknna"), ("image", "cka")]].isna().all()


def test_floors_are_what_constant_answers_reach(tiny):
    """Each by its definition, on the run's own training and validation images; more knowledge of where does not hurt here."""
    table = tables.alignment_floors(Run.open("tiny"), images=512).set_index("predictor").value
    teacher = load_scenes_teacher()
    (train, classes), (val, labels) = scenes(512), scenes(96, first=1 << 40)
    unit, target = F.normalize(teacher(train), dim=-1), teacher(val)
    of_class = torch.stack([unit[classes == c].mean(0) for c in labels])
    for name, answer in {"constant": unit.mean((0, 1)), "position": unit.mean(0), "class and position": of_class}.items():
        cosine = (F.normalize(answer.expand_as(target), dim=-1) * F.normalize(target, dim=-1)).sum(-1)
        assert table[name] == pytest.approx(-cosine.mean().item(), abs=1e-6)
    assert table["position"] < table["constant"]


def test_tokenizer_profile_compares_before_and_after_quantisation(tiny):
    tokenizer, (images, _) = load_tokenizer("tiny-joint"), scenes(12, first=1 << 40)
    features = tokenizer_features(tokenizer, images)
    codes = tokenizer.quantizer.codes()
    assert torch.equal(features["pre"], tokenizer.latents(images).flatten(2).transpose(1, 2))
    assert torch.equal(features["post"], codes[tokenizer.encode(images).flatten(1)])
    table = tables.tokenizer_profile(Run.open("tiny-joint"), images=40, k=5)
    assert set(table.layer) == {"pre", "post", "teacher"} and set(table.level) == {"image", "patch", "content", "map"}
    ties = table[table.metric == "ties"].value.item()
    assert 0.5 < ties <= 1  # 64 codes for 64 tokens: many are equal
