"""The numbers of an evaluation: golden values and identities, streaming, sources, protocols, and the
command `gear evaluate`.
"""

import io
import json
import math
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import scenes, tiny_generator, tiny_tokenizer
from safetensors.torch import save_file

from gear.__main__ import main
from gear.config import UserError
from gear.device import derived_seed
from gear.evaluation import evaluate as evaluation
from gear.evaluation import networks, scores, sources
from gear.evaluation.evaluate import (
    EvaluateOptions,
    Sampling,
    evaluate_run,
    metrics_table,
    read_metrics,
)
from gear.evaluation.lpips import load_lpips
from gear.evaluation.reconstruction import measure
from gear.evaluation.scores import (
    FeatureSet,
    compare,
    extract,
    halves_distance,
    protocol_id,
    record,
)
from gear.evaluation.sources import (
    balanced_labels,
    draw_samples,
    npz_images,
    open_images,
    read_npz,
    reference,
    write_npz,
)
from gear.measures import neighbours
from gear.measures.frechet import ROWS, InceptionScore, Moments, frechet_distance
from gear.measures.neighbours import mmd, polynomial_mmd, prdc, precision_recall, radii
from gear.measures.reconstruction import l1, psnr, ssim
from gear.runs.run import Run
from gear.tokenizer.model import images_at_once, reconstruct

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "dist.npz")
REAL, FAKE, LOGITS = (
    torch.from_numpy(ARRAYS[key]) for key in ("real", "fake", "logits_sorted_by_class")
)
RECON = json.loads((GOLDEN / "expected.json").read_text())["recon"]["expected"]
ATOL = 1e-6  # for the golden values of `dist`

# -- golden values of `dist`, from torch-fidelity 0.4.0, prdc, gpic_eval_dino, dgm-eval and ADM ----


def moments(rows):
    streamed = Moments(rows.shape[1]).update(rows)
    return streamed.mean, streamed.covariance


def inception_score(logits, split):
    return InceptionScore(split).update(logits).value()


def test_frechet_distance_golden():
    ours = frechet_distance(moments(FAKE), moments(REAL))
    for theirs in (7.363881517426165, 7.363881517426169, 7.363881517426176, 7.363881517426158):
        assert ours == pytest.approx(theirs, abs=1e-10)
    assert (moments(FAKE)[0] - moments(REAL)[0]).square().sum().item() == pytest.approx(
        3.5459399254556665, abs=1e-10
    )
    biased = [(m, s * (n - 1) / n) for (m, s), n in ((moments(FAKE), 120), (moments(REAL), 160))]
    assert (
        abs(frechet_distance(*biased) - ours) > 1e-3
    )  # a covariance divided by N gives another number


def test_inception_score_golden():
    """Samples in the order of the file, as in ADM; torch-fidelity's shuffle, and a single split,
    give other numbers.
    """
    by_class = inception_score(LOGITS, 40)
    assert by_class == pytest.approx(2.261720717554128, abs=ATOL)
    permuted = LOGITS[torch.from_numpy(np.random.default_rng(0).permutation(400))]
    assert inception_score(permuted, 40) == pytest.approx(3.137038097077166, abs=ATOL)
    shuffled = LOGITS[torch.from_numpy(np.random.RandomState(2020).permutation(400))]
    assert inception_score(shuffled, 40) == pytest.approx(3.120989781095575, abs=ATOL)
    single_split = inception_score(LOGITS, scores.IS_SPLIT)
    assert single_split == pytest.approx(3.2978786435207414, abs=ATOL)
    assert min(abs(single_split - score) for score in (by_class, 3.120989781095575)) > 0.1


def test_precision_and_recall_golden():
    """ADM computes them in float16, which differs from the exact values for so few samples."""
    assert precision_recall(REAL, FAKE) == pytest.approx((0.9583333333333334, 0.725), abs=ATOL)
    assert radii(REAL, 3, half=True)[:3].tolist() == [18.125, 19.375, 28.8125]
    exact = precision_recall(REAL, FAKE, half=False)
    assert exact == pytest.approx((0.95, 0.73125), abs=ATOL)
    assert precision_recall(FAKE, REAL, half=False) == pytest.approx(
        exact[::-1], abs=ATOL
    )  # torch-fidelity before 0.4.0
    assert exact != pytest.approx(exact[::-1], abs=0.1)


@pytest.mark.parametrize(
    "k, expected",
    (
        (3, dict(precision=0.95, recall=0.73125, density=1.238888888888889, coverage=0.8125)),
        (5, dict(precision=1.0, recall=0.8125, density=1.2283333333333335, coverage=0.91875)),
    ),
)
def test_prdc_golden(k, expected, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 120 * 7)  # uneven blocks, which must have no effect
    assert prdc(REAL, FAKE, k) == pytest.approx(expected, abs=ATOL)
    assert prdc(FAKE, REAL, k) != pytest.approx(expected, abs=1e-3)


def test_kernel_distance_golden():
    mean, std = polynomial_mmd(REAL, FAKE, 20, 60, seed=2020)
    assert mean == pytest.approx(51.04527512160649, abs=ATOL) and std == pytest.approx(
        16.158529743015066, abs=ATOL
    )
    full = mmd(FAKE.double(), REAL[:120].double())
    assert full == pytest.approx(60.52682796443327, abs=ATOL)
    m = 120
    cross = (FAKE.double() @ REAL[:120].double().T / 16 + 1) ** 3
    u_statistic = full + 2 * cross.mean() - 2 * (cross.sum() - cross.trace()) / (m * (m - 1))
    assert abs(u_statistic - full) > 1e-2  # the cross term keeps its diagonal


def recon():
    arrays = np.load(GOLDEN / "recon.npz")
    return [torch.from_numpy(arrays[key]) * 2 - 1 for key in ("rec", "ref")]


def test_reconstruction_golden():
    rec, ref = recon()
    assert l1(rec, ref).mean().item() == pytest.approx(RECON["gear_l1"], abs=2e-5)
    per_image = psnr(rec, ref)
    assert per_image.tolist() == pytest.approx(RECON["skimage_psnr_per_image"], abs=2e-5)
    mean = per_image.mean().item()
    assert mean == pytest.approx(RECON["gear_psnr_mean_over_images"], abs=2e-5)
    assert mean == pytest.approx(RECON["torchmetrics_psnr_per_image_mean"], abs=2e-5)
    assert abs(mean - RECON["psnr_of_pooled_mse_WRONG"]) > 1
    assert ssim(rec, ref).tolist() == pytest.approx(
        RECON["skimage_ssim_dr1_uniform7_PRIMARY"], abs=2e-5
    )


@pytest.mark.parametrize("key", [key for key in RECON if "ssim" in key and "PRIMARY" not in key])
def test_another_ssim_is_another_number(key):
    """Other variants differ: a data range of 2, a Gaussian window, and another border."""
    ours = ssim(*recon()).tolist()
    assert all(abs(a - b) > 1e-3 for a, b in zip(ours, RECON[key]))


def test_rounded_reconstructions_are_another_number():
    rec, ref = recon()
    rounded = ((rec * 127.5 + 127.5).round() / 127.5 - 1).clamp(-1, 1)
    assert psnr(rounded, ref).tolist() == pytest.approx(
        RECON["uint8_rounded_rec_psnr_per_image"], abs=2e-5
    )
    assert (psnr(rec, ref) - psnr(rounded, ref)).abs().min() > 1e-3


# -- identities ------------------------------------------------------------------------------------


def gaussian(seed, n=400, d=12, mean=0.0, scale=1.0):
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
        + mean
    )


def test_frechet_distance_identities():
    x, y = gaussian(0), gaussian(1, mean=0.5, scale=2.0)
    fd = lambda a, b: frechet_distance(moments(a), moments(b))
    shift, base = gaussian(2, 1)[0], fd(x, y)
    rotation = torch.linalg.qr(gaussian(3, 12))[0]
    assert fd(x, x) == pytest.approx(0, abs=1e-10)
    assert fd(y, x) == pytest.approx(base, rel=1e-10)
    assert fd(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-10)
    assert fd(3 * x, 3 * y) == pytest.approx(9 * base, rel=1e-10)
    assert fd(x @ rotation, y @ rotation) == pytest.approx(base, rel=1e-10)
    identity = torch.eye(12, dtype=torch.float64)
    spheres = (torch.zeros(12), 1.5**2 * identity), (torch.full((12,), 0.25), 0.5**2 * identity)
    assert frechet_distance(*spheres) == pytest.approx(
        12 * (1.5 - 0.5) ** 2 + 12 * 0.25**2, rel=1e-12
    )
    few = gaussian(4, 5)  # a covariance of rank 4
    assert fd(few, few) == pytest.approx(0, abs=1e-6)


def test_neighbour_identities():
    x, far = gaussian(0, 90), gaussian(1, 70, mean=1e3)
    assert prdc(x, x.clone(), 5) == dict(precision=1, recall=1, density=1, coverage=1)
    assert prdc(x, far, 5) == dict(precision=0, recall=0, density=0, coverage=0)
    assert precision_recall(x, x.clone()) == (1, 1) and precision_recall(x, far, half=False) == (
        0,
        0,
    )
    y = gaussian(2, 70, scale=0.7)
    forward, backward = prdc(x, y, 5), prdc(y, x, 5)
    assert (forward["precision"], forward["recall"]) == (backward["recall"], backward["precision"])
    assert precision_recall(x, y) == precision_recall(y, x)[::-1]
    assert 0 < forward["recall"] < 1
    inner = prdc(x, x.clone() * 0.1, 5)
    assert inner["density"] > 1  # a density can exceed 1


def test_float16_is_replaced_where_it_overflows():
    x, y = gaussian(0, 50).float(), gaussian(1, 40, scale=0.9).float()
    assert precision_recall(1e4 * x, 1e4 * y) == precision_recall(x, y, half=False)


def test_neighbours_equal_those_of_a_brute_force_search():
    x, y, k = gaussian(0, 30, 3), gaussian(1, 20, 3), 4
    d = lambda a, b: (a[:, None] - b).square().sum(-1)
    torch.testing.assert_close(radii(x, k), d(x, x).sort(dim=1).values[:, k])
    inside = d(x, y) < d(x, x).sort(dim=1).values[:, k, None]
    assert prdc(x, y, k)["density"] == pytest.approx(inside.double().sum().item() / (k * 20))
    assert prdc(x, y, k)["coverage"] == pytest.approx(inside.any(1).double().mean().item())


def test_kernel_distance_of_a_set_to_itself_is_negative_and_vanishes():
    values = [mmd(gaussian(0, m), gaussian(0, m)) for m in (100, 400, 1_600)]
    assert max(values) < 0
    assert values[0] / values[1] == pytest.approx(4, rel=0.25) and values[1] / values[
        2
    ] == pytest.approx(4, rel=0.25)
    assert mmd(gaussian(0), gaussian(1)) == pytest.approx(mmd(gaussian(1), gaussian(0)), rel=1e-9)
    assert abs(mmd(gaussian(0), gaussian(1))) < 1 < mmd(gaussian(0), gaussian(1, mean=2.0))


def test_inception_score_is_between_one_and_the_classes():
    assert 1 <= inception_score(LOGITS, 40) <= 20
    assert inception_score(gaussian(0, 1, 20).expand(100, 20), 50) == pytest.approx(1, abs=1e-12)
    assert inception_score(1e4 * torch.eye(20).repeat(5, 1), 100) == pytest.approx(20, rel=1e-12)


def test_reconstruction_identities():
    rec, ref = recon()
    assert psnr(ref, ref).tolist() == pytest.approx([120, 120]) and l1(ref, ref).sum() == 0
    assert ssim(ref, ref).tolist() == pytest.approx([1, 1], abs=1e-12)
    torch.testing.assert_close(ssim(rec, ref), ssim(ref, rec.clamp(-1, 1)))
    grey = torch.zeros(1, 3, 16, 16)
    for delta in (0.5, 0.1, 0.01):  # of [0, 1]
        assert psnr(grey + 2 * delta, grey).item() == pytest.approx(
            -20 * math.log10(delta), abs=1e-3
        )
        assert l1(grey + 2 * delta, grey).item() == pytest.approx(delta, rel=1e-5)


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", (1, 7, 64, 400))
def test_any_split_into_batches_gives_the_same_statistics(batch):
    x = gaussian(0, mean=3.0)
    mean, covariance = moments(x)
    streamed, score = Moments(12), InceptionScore(150)
    for rows, logits in zip(x.split(batch), LOGITS.split(batch)):
        streamed.update(rows)
        score.update(logits)
    torch.testing.assert_close(streamed.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(streamed.covariance, covariance, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        streamed.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-12
    )
    assert score.value() == pytest.approx(inception_score(LOGITS, 150), rel=1e-12)


def test_adms_rounding_depends_on_the_order_of_the_pair_and_not_on_blocks(monkeypatch):
    """half(half(|u|^2 - 2uv) + |v|^2) differs for (u, v) and (v, u), so neither may replace the
    other.
    """
    x = torch.from_numpy(np.random.default_rng(0).gamma(0.5, size=(400, 128))).float()
    d = neighbours.squared_distances(x, x, True)
    assert not torch.equal(d, d.T)
    expected = d.sort(1).values[:, 3]
    for block in (2**22, 100 * 100, 37 * 37):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        assert torch.equal(neighbours.radii(x, 3, True), expected)
        exact = torch.cdist(x.double(), x.double()).square().sort(1).values[:, 3]
        torch.testing.assert_close(neighbours.radii(x.double(), 3), exact, rtol=1e-8, atol=1e-8)


def test_moments_need_constant_memory():
    streamed, sizes = Moments(12), []
    for seed in range(25):
        streamed.update(gaussian(seed))
        tensors = [
            t
            for value in vars(streamed).values()
            for t in (value if isinstance(value, list) else [value])
        ]
        sizes.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)))
    assert (
        streamed.count > ROWS and max(sizes) < 12 + 12 + 144 + 12 * ROWS
    )  # the sums, and a few rows that are not summed yet


def test_moments_of_several_processes():
    """The merged moments of several processes equal those of all rows, for any split of the rows
    and far from the origin.
    """
    x = gaussian(0, 300, mean=1e3)
    covariance = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    for cuts in ([150, 150], [1, 299], [0, 300], [100, 100, 100]):
        parts = [Moments(12) for _ in cuts]
        for part, rows in zip(parts, x.split(cuts)):
            for batch in rows.split(7):
                part.update(batch)
        merged = Moments(12)
        for part in parts:
            merged.merge(part)
        assert merged.count == 300
        torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.covariance, covariance, rtol=0, atol=1e-9)


def test_a_large_offset_does_not_spoil_the_covariance():
    x = gaussian(0, mean=1e6)
    streamed = Moments(12)
    for rows in x.split(33):
        streamed.update(rows)
    np.testing.assert_allclose(
        streamed.covariance, np.cov((x - 1e6).numpy(), rowvar=False), rtol=0, atol=1e-9
    )


# -- sources ---------------------------------------------------------------------------------------


def pixels(count, side=32, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    )


def test_balanced_labels():
    labels = balanced_labels(103, 5, 0)
    counts = torch.bincount(labels, minlength=5)
    assert (
        len(labels) == 103
        and counts.max() - counts.min() == 1
        and not torch.equal(labels, labels.sort().values)
    )
    assert torch.equal(labels, balanced_labels(103, 5, 0)) and not torch.equal(
        labels, balanced_labels(103, 5, 1)
    )


def sample_chunks(folder, seed=3):
    parts = (tiny_generator(), tiny_tokenizer(codebook_size=11), balanced_labels(19, 5, 0), seed)
    return draw_samples(folder, *parts, quiet=True, grid=(3, 3), temperature=0.8)


@pytest.mark.parametrize("chunks_present", ((), (0,), (1,), (0, 2), (0, 1, 2)))
def test_an_interrupted_call_continues_to_the_same_samples(chunks_present, home, monkeypatch):
    monkeypatch.setitem(sources.CHUNKS, "cpu", 8)
    chunks = list(sample_chunks(home / "one"))
    assert [len(chunk) for chunk in chunks] == [8, 8, 3] and chunks[0].dtype == torch.uint8
    assert chunks[0].unique().numel() > 8 and not torch.equal(chunks[0], chunks[1])
    (home / "two").mkdir()
    for i in chunks_present:
        shutil.copy(home / "one" / f"{i:05d}.npy", home / "two")
    list(sample_chunks(home / "two"))
    files = [sorted((home / folder).iterdir()) for folder in ("one", "two")]
    assert (
        [f.name for f in files[0]]
        == [f.name for f in files[1]]
        == ["00000.npy", "00001.npy", "00002.npy"]
    )
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))


def test_a_call_stopped_between_chunks_keeps_them(home, monkeypatch):
    monkeypatch.setitem(sources.CHUNKS, "cpu", 8)
    interrupted = sample_chunks(home / "one")
    first = next(interrupted)
    interrupted.close()
    file = home / "one" / "00000.npy"
    assert [file] == list((home / "one").iterdir())
    before = file.stat().st_mtime_ns
    assert torch.equal(next(sample_chunks(home / "one")), first)
    assert file.stat().st_mtime_ns == before
    assert not torch.equal(next(sample_chunks(home / "other", seed=4)), first)


def test_the_last_chunk_is_padded_with_the_first_labels():
    """On a GPU, chunks of one size share one CUDA graph. Fewer labels than the size of a chunk make
    one smaller chunk.
    """
    chunks = sources.padded_chunks(torch.arange(19), 8)
    assert [chunk.tolist() for chunk in chunks] == [
        [*range(8)],
        [*range(8, 16)],
        [16, 17, 18, 0, 1, 2, 3, 4],
    ]
    assert [chunk.tolist() for chunk in sources.padded_chunks(torch.arange(16), 8)] == [
        [*range(8)],
        [*range(8, 16)],
    ]
    assert [chunk.tolist() for chunk in sources.padded_chunks(torch.arange(3), 8)] == [[0, 1, 2]]


def test_a_protocol_states_settings_of_drawing_that_differ_from_a_cpus(device):
    on_gpu = {"dtype": "bfloat16", "chunk": 256}
    generator = tiny_generator().to(device)
    assert sources.drawing_protocol(generator) == {"cpu": {}, "cuda": on_gpu}[device]
    half = generator.to(torch.bfloat16)
    expected = {"cpu": {"dtype": "bfloat16"}, "cuda": on_gpu}[device]
    assert sources.drawing_protocol(half) == expected


def damage(path, how):
    content = path.read_bytes()
    if how == "another array":
        np.save(path, np.zeros((3, 8, 8, 3), np.uint8))
    elif how == "another chunk":
        path.write_bytes(path.with_name("00002.npy").read_bytes())
    else:
        changed = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        path.write_bytes(
            {
                "cut": content[:3000],
                "empty": b"",
                "a bit": changed,
                "without its hash": content[:-32],
            }[how]
        )


@pytest.mark.parametrize(
    "how", ("cut", "empty", "a bit", "without its hash", "another array", "another chunk")
)
def test_a_damaged_chunk_is_drawn_again(how, home, monkeypatch):
    monkeypatch.setitem(sources.CHUNKS, "cpu", 8)
    expected = list(sample_chunks(home / "one"))
    before = [path.read_bytes() for path in sorted((home / "one").iterdir())]
    damage(home / "one" / "00000.npy", how)
    calls, draw = [], sources.generate
    monkeypatch.setattr(
        sources, "generate", lambda *a, **k: (calls.append(k["seed"]), draw(*a, **k))[1]
    )
    chunks = sample_chunks(home / "one")
    assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
    assert (
        calls == [derived_seed(3, 0)]
        and [path.read_bytes() for path in sorted((home / "one").iterdir())] == before
    )


def test_npz_round_trip(home):
    images = pixels(150)
    write_npz(home / "samples.npz", images.split(64), 150)
    with np.load(home / "samples.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images)
    assert torch.equal(torch.cat(list(npz_images(home / "samples.npz"))), images)
    for count in (1, 64, 100, 150, 999):
        assert torch.equal(
            torch.cat(list(open_images(home / "samples.npz", 32, count))), images[:count]
        )


class Stub:
    """A feature network without weights: its features are averages of pixels."""

    protocol = {"network": "stub"}

    def __init__(self, name="inception", value=None):
        self.name, self.value = name, value

    def __call__(self, images):
        pool = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).flatten(1) / 255
        pool = pool if self.value is None else torch.full_like(pool, self.value)
        if self.name != "inception":
            return {"pool": pool}
        return {"pool": pool, "spatial": pool[:, :4], "logits": pool[:, :5] * 9}


STATISTICS = {
    "mu": np.full(12, 0.25),
    "sigma": 2 * np.eye(12),
    "mu_s": np.full(4, 0.75),
    "sigma_s": 3 * np.eye(4),
}


def test_a_reference_with_statistics_and_images(home):
    """ADM's statistics are used as they are, its images for the metrics from neighbours."""
    images = pixels(40)
    np.savez(home / "ref.npz", arr_0=images.numpy(), **STATISTICS)
    real = reference(home / "ref.npz", Stub(), 32)
    assert real.name == "ref.npz" and real.count == 40
    assert real.rows.shape == (40, 12) and len(real.digest) == 12
    np.testing.assert_array_equal(real.moments["pool"][1], STATISTICS["sigma"])
    np.testing.assert_array_equal(real.moments["spatial"][0], STATISTICS["mu_s"])
    torch.testing.assert_close(real.rows, Stub()(images)["pool"])
    fake = extract("fake", pixels(2_030, seed=1).split(64), Stub())
    values = compare(fake, real, Stub(), subsets=2, subset_size=20)
    spatial, pool = (
        (STATISTICS["mu_s"], STATISTICS["sigma_s"]),
        (STATISTICS["mu"], STATISTICS["sigma"]),
    )
    assert values["sfid"][0] == frechet_distance(fake.moments["spatial"], spatial)
    assert values["gfid"][0] == frechet_distance(fake.moments["pool"], pool)
    assert values.keys() == {
        "gfid",
        "precision",
        "recall",
        "prdc_precision",
        "prdc_recall",
        "prdc_density",
        "prdc_coverage",
        "kid",
        "sfid",
        "inception_score",
    }
    np.savez(home / "other.npz", arr_0=images.numpy(), **STATISTICS | {"mu": np.zeros(12)})
    assert reference(home / "other.npz", Stub(), 32).digest != real.digest


def test_a_reference_with_statistics_only(home):
    np.savez(home / "ref.npz", **STATISTICS)
    real = reference(home / "ref.npz", Stub(), 32)
    fake = extract("fake", pixels(2_030, seed=1).split(64), Stub())
    assert real.count == 0 and real.rows is None
    assert real.size == "not stated" and fake.size == "32 x 32"
    # metrics from neighbours are left out unless they are named
    assert compare(fake, real, Stub()).keys() == {"gfid", "sfid", "inception_score"}
    for metric in ("precision_recall", "prdc", "kid"):
        with pytest.raises(UserError, match="neighbours"):
            compare(fake, real, Stub(), [metric])
    np.savez(home / "pool.npz", mu=STATISTICS["mu"], sigma=STATISTICS["sigma"])
    with pytest.raises(UserError, match="no spatial statistics"):
        compare(fake, reference(home / "pool.npz", Stub(), 32), Stub(), ["sfid"])


def with_entry(array, position, value):
    array = array.copy()
    array[position] = value
    return array


@pytest.mark.parametrize(
    "arrays, message",
    (
        (
            {"mu": with_entry(STATISTICS["mu"], 3, math.nan)},
            "mu and sigma of '.*ref.npz': .* not finite",
        ),
        (
            {"sigma": with_entry(STATISTICS["sigma"], (2, 2), math.inf)},
            "mu and sigma of .* not finite",
        ),
        (
            {"sigma": with_entry(STATISTICS["sigma"], (2, 3), 0.5)},
            "mu and sigma of .* is not symmetric",
        ),
        ({"mu": np.zeros((1, 12))}, r"of shapes \(1, 12\) and \(12, 12\)"),
        ({"mu": np.array(0.25)}, r"of shapes \(\) and \(12, 12\)"),
        ({"sigma": np.ones(12)}, r"of shapes \(12,\) and \(12,\)"),
        ({"mu": np.full(12, "0.25")}, "arrays of <U4: numbers are expected"),
        ({"sigma": np.eye(12, dtype=complex)}, "arrays of complex128"),
        ({"mu_s": np.zeros(9)}, r"mu_s and sigma_s of .* shapes \(9,\) and \(4, 4\)"),
    ),
)
def test_invalid_statistics_are_refused(arrays, message, home):
    """They raise an error even where no metric is named, and are not left out."""
    np.savez(home / "ref.npz", **STATISTICS | arrays)
    refused(message, reference, home / "ref.npz", Stub(), 32)


def test_statistics_of_another_network_are_not_left_out(home):
    np.savez(home / "ref.npz", mu=np.zeros(7), sigma=np.eye(7))
    fake = extract("fake", pixels(20).split(64), Stub())
    refused("12 and 7 features", compare, fake, reference(home / "ref.npz", Stub(), 32), Stub())
    np.savez(home / "ref.npz", mu=STATISTICS["mu"], sigma=-STATISTICS["sigma"])
    refused(
        "covariance has the eigenvalue",
        compare,
        fake,
        reference(home / "ref.npz", Stub(), 32),
        Stub(),
    )


def test_a_reference_with_neither(home):
    np.savez(home / "ref.npz", images=np.zeros(3), dino_mu=np.zeros(4), dino_sigma=np.eye(4))
    with pytest.raises(
        UserError, match="neither images .* mu, sigma.*it has images, dino_mu, dino_sigma"
    ):
        reference(home / "ref.npz", Stub(), 32)
    assert reference(home / "ref.npz", Stub("dinov2-l"), 32).moments.keys() == {"pool"}
    with pytest.raises(
        UserError, match="neither images .arr_0. nor statistics of this feature network"
    ):
        reference(home / "ref.npz", Stub("scenes"), 32)


# -- records and protocols -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if name != "inception"])
def test_outside_inception_nothing_is_called_fid(name):
    sets = [extract("set", [pixels(20, seed=seed)], Stub(name)) for seed in (0, 1)]
    metrics = compare(*sets, Stub(name), k=2, subsets=2, subset_size=10)
    assert {f"fd_{name}", f"mmd_{name}"} < metrics.keys()
    assert not any(word in metric for metric in metrics for word in ("fid", "kid", "inception"))
    for metric in ("gfid", "kid", "sfid", "inception_score"):
        with pytest.raises(UserError, match=f"unknown metrics {metric} .*Known: fd_{name}"):
            compare(*sets, Stub(name), [metric])


def test_protocols_have_different_ids():
    base = {"network": "inception", "samples_count": 50_000, "resize": "bicubic"}
    assert protocol_id(base) == protocol_id(
        base | {"weights_of": "run", "step": 3, "samples_hash": "ab", "spread": 0.1}
    )
    ids = {protocol_id(base | {"seed": seed}) for seed in range(2_000)}
    assert len(ids) == 2_000  # no two of them share a column


def table_of(home, *entries):
    path = home / "runs" / "one"
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(list(entries)))
    return metrics_table([Run(path)])


def test_two_protocols_never_share_a_column(home):
    table, protocols = table_of(
        home, *(record("gfid", seed, {"seed": seed}) for seed in range(300))
    )
    assert table.shape == (1, 300) and len(protocols) == 300
    assert sorted(table.loc["one"]) == list(range(300))


def test_the_table_shows_the_newest_step(home):
    entries = [record("gfid", step, {"step": step, "seed": 0}) for step in (10, 100, 20, 5)]
    table, _ = table_of(home, *entries)
    assert table.shape == (1, 1) and table.iloc[0, 0] == 100


# -- gear evaluate ---------------------------------------------------------------------------------

FEW = EvaluateOptions(
    sampling=Sampling(count=70), network="scenes", reference_count=90, device="cpu", quiet=True
)


def few(sampling=(), **changes):
    return EvaluateOptions(
        **{**vars(FEW), **changes, "sampling": Sampling(**{"count": 70, **dict(sampling)})}
    )


def by_metric(records):
    return {r["metric"]: r for r in records}


def test_evaluate_writes_each_number_with_its_protocol(tiny):
    records = evaluate_run("tiny", FEW)
    run = Run.open("tiny")
    entries = by_metric(records)
    assert entries.keys() == {
        "fd_scenes",
        "fd_scenes_halves",
        "mmd_scenes",
        "precision",
        "recall",
        "prdc_precision",
        "prdc_recall",
        "prdc_density",
        "prdc_coverage",
        "ntp_loss",
        "usage_entropy",
        "predictable",
    }
    protocol = entries["fd_scenes"]["protocol"]
    assert (
        protocol.items()
        >= {
            "network": "scenes",
            "count": 70,
            "samples_count": 70,
            "cfg_scale": 1.0,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 0,
            "rounding": "uint8",
            "resize": "bicubic",
            "reference": "scenes",
            "reference_count": 90,
            "image_size": 32,
            "weights_of": "tiny",
            "step": run.step,
        }.items()
    )
    assert {
        "labels",
        "weights",
        "interpolation",
        "reference_hash",
        "samples_hash",
    } <= protocol.keys()
    assert not {"dtype", "chunk", "device"} & protocol.keys()  # only a GPU's are stated
    assert entries["precision"]["protocol"]["k"] == 3
    assert "float16" in entries["precision"]["protocol"]["distance"]
    values = {name: entry["value"] for name, entry in entries.items()}
    assert values["predictable"] == pytest.approx(
        values["usage_entropy"] - values["ntp_loss"], abs=1e-9
    )
    assert values["fd_scenes"] > 0 and 0 <= values["recall"] <= 1
    as_text = lambda entry: json.dumps(entry, sort_keys=True)  # noqa: E731
    assert sorted(read_metrics(run), key=as_text) == sorted(records, key=as_text)
    low, high = entries["ntp_loss"]["interval"]
    assert low < values["ntp_loss"] < high and "interval" not in entries["fd_scenes"]
    content = (run.path / "metrics.json").read_bytes()

    evaluate_run("tiny", FEW)  # from the kept samples
    assert (run.path / "metrics.json").read_bytes() == content
    chunks = sorted((run.path / "evaluation").rglob("*.npy"))
    assert len(chunks) == 2
    chunks[0].unlink()  # as after an interruption
    (run.path / "metrics.json").unlink()
    evaluate_run("tiny", FEW)
    assert (run.path / "metrics.json").read_bytes() == content

    # the records of both seeds are kept, in different columns
    second = by_metric(evaluate_run("tiny", few({"seed": 1})))
    assert protocol_id(second["fd_scenes"]["protocol"]) != protocol_id(protocol)
    assert second["fd_scenes"]["value"] != values["fd_scenes"]
    assert second["ntp_loss"] == entries["ntp_loss"]
    table, protocols = metrics_table([run])
    assert len([c for c in table.columns if c.startswith("fd_scenes [")]) == 2
    assert all(c.split("[")[1][:-1] in protocols for c in table.columns)


def test_sweep_reuses_kept_samples(tiny):
    single = by_metric(evaluate_run("tiny", few(metrics=("fd_scenes",))))
    before = {
        path: path.stat().st_mtime_ns for path in (tiny / "tiny" / "evaluation").rglob("*.npy")
    }
    records = evaluate_run("tiny", few(metrics=("fd_scenes",), sweep="cfg_scale=1,1.5,2"))
    swept = [r for r in records if r["metric"] == "fd_scenes"]
    assert [r["protocol"]["cfg_scale"] for r in swept] == [1, 1.5, 2] and len(
        {r["value"] for r in swept}
    ) == 3
    assert swept[0] == single["fd_scenes"] and len({protocol_id(r["protocol"]) for r in swept}) == 3
    assert len({r["protocol"]["reference_hash"] for r in swept}) == 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [r["metric"] for r in records].count("ntp_loss") == 1


def test_samples_are_resized_before_they_are_rounded(tiny, home):
    """Table 13: a bicubic resize of the decoder's floats, then uint8; the reference has the same
    size.
    """
    options = few(sample_size=16, metrics=("fd_scenes",), export=str(home / "x.npz"))
    protocol = by_metric(evaluate_run("tiny", options))["fd_scenes"]["protocol"]
    assert protocol["samples_resized"] == 16 and protocol["samples_size"] == "16 x 16"
    assert protocol["reference_size"] == "16 x 16" and "image_size" not in protocol
    resized = torch.from_numpy(read_npz(home / "x.npz")["arr_0"])
    evaluate_run("tiny", replace(options, sample_size=0))
    plain = torch.from_numpy(read_npz(home / "x.npz")["arr_0"]).permute(0, 3, 1, 2).float()
    expected = F.interpolate(plain, (16, 16), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1)
    errors = (resized.float() - expected).abs()
    assert errors.max() <= 2, "samples are rounded once, after the resize; these are rounded twice"
    assert 0.1 < errors.mean() < 0.5


def test_export_and_samples_of_a_file(tiny, home):
    of_run = by_metric(evaluate_run("tiny", few(export=str(home / "out" / "samples.npz"))))
    images = read_npz(home / "out" / "samples.npz")["arr_0"]
    assert images.shape == (70, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(
        images, np.concatenate([np.load(p) for p in sorted((tiny / "tiny").rglob("*.npy"))])
    )
    of_file = by_metric(evaluate_run("tiny", few(samples=str(home / "out" / "samples.npz"))))
    assert of_file["fd_scenes"]["value"] == of_run["fd_scenes"]["value"]
    assert "ntp_loss" not in of_file
    protocols = [entries["fd_scenes"]["protocol"] for entries in (of_file, of_run)]
    assert protocols[0]["samples_hash"] == protocols[1]["samples_hash"]
    assert protocols[0]["samples"] == "samples.npz" and "cfg_scale" not in protocols[0]
    assert protocol_id(protocols[0]) != protocol_id(protocols[1])
    same = by_metric(evaluate_run("tiny", few(reference=str(home / "out" / "samples.npz"))))
    assert (
        same["fd_scenes"]["value"] == pytest.approx(0, abs=1e-6)
        and same["prdc_coverage"]["value"] == 1
    )


def test_each_set_has_its_own_size_in_the_protocol(tiny, home, capsys):
    """Samples and references of different sizes are reported, and their sizes are in the
    protocol.
    """
    images = pixels(40, 32)
    np.savez(home / "s32.npz", images)
    np.savez(home / "s64.npz", images.repeat_interleave(2, 1).repeat_interleave(2, 2))
    sizes = []
    for files in (
        dict(),
        dict(samples="s32.npz"),
        dict(samples="s64.npz"),
        dict(reference="s64.npz"),
        dict(samples="s64.npz", reference="s32.npz"),
        dict(samples="s64.npz", reference="s64.npz"),
    ):
        paths = {option: str(home / file) for option, file in files.items()}
        protocol = by_metric(evaluate_run("tiny", few(metrics=("fd_scenes",), **paths)))[
            "fd_scenes"
        ]["protocol"]
        output = capsys.readouterr().err
        differ = protocol["samples_size"] != protocol["reference_size"]
        warning = (
            f"samples of {protocol['samples_size']} px are compared with a reference of "
            f"{protocol['reference_size']} px"
        )
        assert (output.count(warning) == 1) if differ else (output == "")
        assert ("image_size" in protocol) == (protocol["samples_size"] == "32 x 32")
        sizes.append((protocol["samples_size"][:2], protocol["reference_size"][:2]))
    assert sizes == [
        ("32", "32"),
        ("32", "32"),
        ("64", "32"),
        ("32", "64"),
        ("64", "32"),
        ("64", "64"),
    ]
    evaluation.report([Run.open("tiny")])
    assert (
        capsys.readouterr().out.count(
            "samples of 64 x 64 px are compared with a reference of 32 x 32 px"
        )
        == 2
    )


@pytest.mark.parametrize(
    "array, message",
    (
        (np.zeros((9, 32, 32), np.uint8), r"\(9, 32, 32\) uint8"),
        (np.zeros((9, 32, 32, 1), np.uint8), r"\(9, 32, 32, 1\) uint8"),
        (np.zeros((9, 32, 32, 4), np.uint8), r"\(9, 32, 32, 4\) uint8"),
        (np.zeros((9, 32, 32, 3), np.float32), "float32"),
        (np.zeros((0, 32, 32, 3), np.uint8), "holds no images"),
        (np.zeros((1, 32, 32, 3), np.uint8), "nothing can be measured"),
    ),
)
def test_arrays_that_are_no_images_are_refused(array, message, tiny, home):
    np.savez(home / "x.npz", array)
    for option in ("samples", "reference"):
        if message == "nothing can be measured" and option == "reference":
            continue  # the class score of samples needs no reference
        refused(message, evaluate_run, "tiny", few(**{option: str(home / "x.npz")}))
    assert not (tiny / "tiny" / "metrics.json").exists()


OPTIONS = {
    "--reference": ["stats.npy", "nowhere", "nowhere.npz", "text.npz"],
    "--samples": ["samples.npy", "nowhere", "nowhere.npz", "text.npz"],
    "--captions": ["nowhere", "empty.txt"],
    "--export": [".", "text.npz/x.npz"],
    "--network": ["inceptoin"],
    "--metrics": ["gfid"],
}


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in OPTIONS.items() for value in values]
)
def test_an_invalid_value_is_reported_with_its_option(
    option, value, tiny, home, capsys, monkeypatch
):
    monkeypatch.chdir(home)
    (home / "text.npz").write_text("text")
    (home / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "tiny", "--network", "scenes", "--count", "4", "--quiet", option, value])
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert output.startswith(f"gear: {option}: ") and "Traceback" not in output
    assert not value.endswith(".npy") or "a .npy holds one array" in output
    assert not (tiny / "tiny" / "metrics.json").exists()
    assert (
        option == "--metrics"
        or not (tiny / "tiny" / "evaluation").exists()
        or option == "--samples"
    )


def test_missing_weights_are_reported_with_their_option(tiny, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "tiny", "--network", "inception", "--weights", "nowhere", "--count", "4"])
    assert capsys.readouterr().err.startswith("gear: --weights: ")


def test_a_folder_may_be_called_npz(tiny, home):
    (home / "x.npz").mkdir()
    for i, image in enumerate(pixels(12).numpy()):
        networks.Image.fromarray(image).save(home / "x.npz" / f"{i}.png")
    protocol = by_metric(
        evaluate_run("tiny", few(samples=str(home / "x.npz"), metrics=("fd_scenes",)))
    )["fd_scenes"]["protocol"]
    assert protocol["samples_count"] == 12


def test_a_measure_of_pairs_does_not_depend_on_batches():
    images, reconstructions = (
        2 * torch.rand(2, 37, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    ).unbind()
    sizes = []
    for distance in (psnr, ssim, l1):
        counted = lambda x, y, f=distance: (sizes.append(len(x)), f(x, y))[1]  # noqa: E731
        measured = measure(counted, reconstructions, images)
        assert torch.equal(measured, distance(reconstructions, images))
    assert sizes == [16, 16, 5] * 3


def test_reconstructions_are_decoded_in_batches(device):
    """They are returned on the device of the images."""
    tokenizer, images = tiny_tokenizer().eval().to(device), scenes(19)[0]
    sizes = []
    tokenizer.decoder.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    decoded, indices = reconstruct(tokenizer, images)
    assert decoded.device == indices.device == images.device and decoded.shape == images.shape
    assert sizes == {"cpu": [8, 8, 3], "cuda": [19]}[device]
    with torch.no_grad():
        assert torch.equal(indices[:8], tokenizer.encode(images[:8].to(device)).cpu())
        torch.testing.assert_close(decoded[:8], tokenizer.decode(indices[:8].to(device)).cpu())
    assert (
        images_at_once(torch.device("cuda"), 256 * 256) == 32
        and images_at_once(torch.device("cuda"), 4096**2) == 1
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_of_a_gpu_are_those_of_a_cpu(tiny):
    """Reconstructions and likelihoods agree; samples drawn on a GPU are different ones."""
    on_cpu, on_gpu = (
        by_metric(evaluate_run("tiny", few(both=True, device=name))) for name in ("cpu", "cuda")
    )
    for metric in ("psnr", "ssim", "l1", "rfd_scenes", "ntp_loss", "usage_entropy"):
        assert on_gpu[metric]["value"] == pytest.approx(on_cpu[metric]["value"], rel=1e-3)
        assert on_gpu[metric]["protocol"] == on_cpu[metric]["protocol"]
    settings = {"dtype": "bfloat16", "chunk": 256}
    assert on_gpu["fd_scenes"]["protocol"].items() >= settings.items()
    assert not settings.keys() & on_cpu["fd_scenes"]["protocol"].keys()


def test_reconstruction_of_a_run(tiny):
    entries = by_metric(evaluate_run("tiny", few(reconstruction=True, reference_count=40)))
    assert entries.keys() == {"psnr", "ssim", "l1", "rfd_scenes"}
    assert (
        entries["psnr"]["protocol"].items()
        >= {"images": 40, "rounding": "none", "split": "val"}.items()
    )
    assert entries["rfd_scenes"]["protocol"]["network"] == "scenes"
    assert not (tiny / "tiny" / "evaluation").exists()
    repeated = by_metric(evaluate_run("tiny", few(reconstruction=True, reference_count=40)))
    assert repeated == entries


def test_runs_of_one_protocol_share_a_column(tiny):
    shutil.copytree(tiny / "tiny", tiny / "twin")
    for name in ("tiny", "twin"):
        evaluate_run(name, few(metrics=("fd_scenes",)))
    table, _ = metrics_table([Run.open(name) for name in ("tiny", "twin")])
    assert list(table.index) == ["tiny", "twin"] and table.notna().all().all()
    assert (table.loc["tiny"] == table.loc["twin"]).all()


def test_the_command(tiny, capsys):
    main(["evaluate", "tiny", *COMMAND])
    output = capsys.readouterr().out
    assert "fd_scenes" in output and "ntp_loss" in output and "network scenes" in output
    assert {r["metric"] for r in read_metrics(Run.open("tiny"))} == {
        "fd_scenes",
        "fd_scenes_halves",
        "ntp_loss",
        "usage_entropy",
        "predictable",
    }


COMMAND = "--network scenes --count 20 --reference-count 30 --metrics fd_scenes --quiet".split()


def test_the_command_reports_a_misspelt_option(tiny, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "tiny", *COMMAND, "--sweep", "cfg_scal=1,2"])
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Did you mean 'cfg_scale'?" in output and "Traceback" not in output


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    (
        (dict(network="inceptoin"), "unknown feature network 'inceptoin'. Known: inception"),
        (dict(metrics=("gfid",)), "unknown metrics gfid in this feature space. Known: fd_scenes"),
        (dict(sweep="cfg_scale=1,high"), "is no list of numbers for cfg_scale"),
        (dict(sweep="cfg_scale"), "as in cfg_scale=1,1.25,1.5"),
        (dict(sweep="weights=1,2"), "one of count, cfg_scale"),
        (dict(sampling={"count": 1}), "count is 1: it has to be at least 2"),
        (dict(sampling={"count": 4}, metrics=("prdc",)), "k = 5 neighbours of 4 samples"),
        (dict(sampling={"temperature": -1.0}), "temperature"),
        (dict(samples="nowhere.npz"), "there is no file nowhere.npz"),
        (dict(reference="nowhere"), "there are no images at 'nowhere'"),
    ),
)
def test_evaluate_refuses(changes, message, tiny):
    with pytest.raises(UserError) as error:
        evaluate_run("tiny", few(**changes))
    assert message in str(error.value)
    assert not (tiny / "tiny" / "metrics.json").exists()


def refused(message, function, *arguments, **keywords):
    with pytest.raises(UserError, match=message):
        function(*arguments, **keywords)


def test_a_frechet_distance_of_inception_needs_more_samples_than_features():
    """The stub has 12 pool features (Inception: 2,048) and 4 spatial ones (2,023). With fewer
    samples the covariance is singular, and two sets of one distribution are far apart.
    """
    sets = {count: extract("few", pixels(count, 8).split(64), Stub()) for count in (4, 5, 12, 13)}
    for metric, features in (("sfid", 4), ("gfid", 12)):
        enough, few = sets[features + 1], sets[features]
        value, details = compare(enough, enough, Stub(), [metric])[metric]
        assert value == pytest.approx(0, abs=1e-9) and details == {}
        for pair in ((few, enough), (enough, few)):
            message = f"'few' has {features} samples: {features + 1} at least"
            refused(message, compare, *pair, Stub(), [metric])
            assert metric not in compare(*pair, Stub(), k=1, subsets=1, subset_size=3)


def test_a_frechet_distance_of_few_samples_is_marked_in_other_spaces():
    network = Stub("other")
    for count, details in (
        (12, {"covariance": "singular: no more samples than features"}),
        (13, {}),
    ):
        few = extract("few", pixels(count, 8).split(64), network)
        assert compare(few, few, network, ["fd_other"])["fd_other"][1] == details
        moments = {"pool": few.moments["pool"]}
        from_file = FeatureSet("file", "", 0, moments, file_moments=("pool",))
        assert compare(from_file, from_file, network, ["fd_other"])["fd_other"][1] == {}


def test_halves_of_a_reference_have_the_distance_of_two_sets_of_one_distribution():
    """Halves of 1,000 rows of D = 64 standard normal features: the errors of the covariances give a
    distance of about 2 D^2 / 4 n.
    """
    rows = torch.randn(2_000, 64, generator=torch.Generator().manual_seed(1))
    real = FeatureSet("x", "", 2_000, rows=rows)
    distance, count = halves_distance(real, Stub("other"))
    assert count == 1_000 and 1.5 < distance < 2.7
    larger, _ = halves_distance(FeatureSet("x", "", 1_000, rows=rows[:1_000]), Stub("other"))
    assert 1.7 < larger / distance < 2.3, "with half as many samples the distance is twice as large"
    assert halves_distance(FeatureSet("x", "", 9), Stub("other")) is None
    from_file = FeatureSet("x", "", 2_000, rows=rows, file_moments=("pool",))
    assert halves_distance(from_file, Stub("other")) is None, "its statistics are of other images"
    assert halves_distance(FeatureSet("x", "", 60, rows=rows[:60]), Stub("inception")) is None


def test_neighbours_of_many_rows_are_those_of_a_random_subset(monkeypatch):
    """GPIC's protocol: density and coverage of 10,000 random rows of each set; the details state
    the number.
    """
    monkeypatch.setattr(scores, "PRDC_ROWS", 50)
    sets = [
        FeatureSet(name, "", len(rows), rows=rows)
        for name, rows in (("a", gaussian(0, 80)), ("b", gaussian(1, 60)))
    ]
    metrics = compare(*sets, Stub("other"), ["prdc"])
    assert metrics["prdc_density"][1].items() >= {"rows": 50, "rows_seed": 0}.items()
    adm = compare(*sets, Stub("other"), ["precision_recall"])
    assert "rows" not in adm["precision"][1], "ADM compares all rows"
    repeated = compare(*sets, Stub("other"), ["prdc"])
    assert metrics == repeated != compare(*sets, Stub("other"), ["prdc"], seed=1)
    monkeypatch.setattr(scores, "PRDC_ROWS", 80)
    assert "rows" not in compare(*sets, Stub("other"), ["prdc"])["prdc_density"][1]


def test_features_of_a_gpic_file_are_used_for_metrics_from_neighbours(home):
    """dino_embeddings are used for precision, recall, density, coverage and MMD; the Fréchet
    distance uses the statistics of the file.
    """
    network, rows = Stub("dinov2-l"), gaussian(3, 80).float()
    fake = FeatureSet(
        "mine",
        "",
        60,
        {"pool": (rows[:60].double().mean(0), torch.cov(rows[:60].double().T))},
        rows[:60],
    )
    statistics = {"dino_mu": np.zeros(rows.shape[1]), "dino_sigma": np.eye(rows.shape[1])}
    np.savez(home / "test_stats.npz", dino_embeddings=rows.numpy(), **statistics)
    real = sources.reference(home / "test_stats.npz", network, 8)
    metrics = compare(fake, real, network, subset_size=20)
    assert metrics.keys() >= {
        "fd_dinov2-l",
        "mmd_dinov2-l",
        "precision",
        "recall",
        "prdc_density",
        "prdc_coverage",
    }
    assert metrics["prdc_precision"][0] == 1, "every sample is in the reference"
    assert torch.equal(real.moments["pool"][0], torch.zeros(rows.shape[1], dtype=torch.float64))
    np.savez(home / "features.npz", dino_embeddings=rows.numpy())
    features_only = sources.reference(home / "features.npz", network, 8)
    assert torch.allclose(features_only.moments["pool"][0], rows.double().mean(0))
    np.savez(home / "bad.npz", dino_embeddings=np.zeros((3, 2, 2)))
    refused(
        "dino_embeddings of '.*bad.npz' is .3, 2, 2. .*: float rows",
        sources.reference,
        home / "bad.npz",
        network,
        8,
    )


@pytest.mark.parametrize("k", (0, 3, 7))
def test_more_neighbours_than_samples(k):
    for metric in (prdc, precision_recall):
        for sets in ((gaussian(0), gaussian(1, 3)), (gaussian(1, 3), gaussian(0))):
            refused(f"k = {k} neighbours of [0-9]+ samples: k has to lie in", metric, *sets, k)


def test_more_in_a_subset_than_samples():
    refused(
        "subsets of 50 need as many samples", polynomial_mmd, gaussian(0), gaussian(1, 49), 2, 50
    )


def test_images_of_mixed_size():
    refused("mixed size", extract, "set", [pixels(3), pixels(3, 16)], Stub())


def test_no_images():
    refused("holds no images", extract, "set", [], Stub())
    refused("holds no images", extract, "set", [pixels(0)], Stub())
    refused("no samples", InceptionScore().value)
    refused("no covariance", lambda: Moments(3).update(torch.zeros(1, 3)).covariance)


@pytest.mark.parametrize("name", ("scenes", "efficientnet-lite0"))
def test_floats_out_of_range(name):
    network = networks.load_network_by_name(name)
    images = torch.rand(2, 3, 32, 32)
    assert network(images)["pool"].shape[0] == 2
    assert torch.equal(network(images.double())["pool"], network(images)["pool"])
    for wrong in (
        images * 255,
        images - 2,
        images * math.nan,
        (images * 255).to(torch.uint8),
        pixels(2).long(),
    ):
        refused("expected", network, wrong)


def test_reconstruction_refuses_another_range():
    images = torch.rand(2, 3, 16, 16)
    for metric in (l1, psnr, ssim):
        refused("are expected", metric, images, images * 255)
        refused("are expected", metric, images, (images * 255).to(torch.uint8))
        refused("are expected", metric, images, images * math.nan)
        refused(
            "reconstructions hold values that are not finite", metric, images * math.inf, images
        )
        refused("one shape", metric, images[:1], images)
        assert torch.isfinite(metric(images * 3, images)).all()  # a reconstruction is clamped
    refused("too small", ssim, images[..., :5, :5], images[..., :5, :5])


def test_lpips_checks_images_unless_a_gradient_is_needed(monkeypatch, home):
    """Training computes LPIPS at every step and must not wait for the device."""
    monkeypatch.setattr("gear.evaluation.lpips.lpips_backbone", lambda: home)
    monkeypatch.setattr("gear.evaluation.lpips.file_hash", lambda path: "397923af")
    monkeypatch.setattr("lpips.LPIPS", lambda **options: torch.nn.PairwiseDistance())
    distance, images = load_lpips(), torch.rand(2, 3, 16, 16)
    assert distance(images, images).shape == (2 * 3 * 16,)
    refused("are expected", distance, images, images * 255)
    refused("not finite", distance, images * math.nan, images)
    assert distance((images * math.nan).requires_grad_(), images).isnan().all()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_features_that_are_not_finite_are_refused(value):
    refused("not finite", extract, "set", [pixels(3)], Stub(value=value))
    refused("not finite", Moments(3).update, torch.full((2, 3), value))
    refused("not finite", InceptionScore().update, torch.full((2, 3), value))
    rows, damaged = gaussian(0), gaussian(1)
    damaged[3, 1] = value
    for sets in ((rows, damaged), (damaged, rows)):
        refused("not finite", precision_recall, *sets)
        refused("not finite", prdc, *sets)
        refused("not finite", polynomial_mmd, *sets, 2, 10)


def test_a_value_that_is_not_finite_is_not_recorded(monkeypatch):
    refused("gfid is nan", record, "gfid", math.nan, {})
    sets = [extract("some", pixels(20, seed=seed).split(64), Stub("scenes")) for seed in (0, 1)]
    monkeypatch.setattr(scores, "frechet_distance", lambda *sets: math.inf)
    for names in (None, ["fd_scenes"]):
        refused(
            "fd_scenes of 'some' is inf",
            compare,
            *sets,
            Stub("scenes"),
            names,
            subsets=1,
            subset_size=9,
        )


@pytest.mark.parametrize("count", (0, 1))
def test_too_few_samples_are_refused(count):
    few, rows = gaussian(1, 40)[:count], gaussian(0, 40)
    for sets in ((few, rows), (rows, few)):
        refused(
            f"neighbours of {count} samples: 4 samples at least are needed", precision_recall, *sets
        )
        refused(f"neighbours of {count} samples: 6 samples at least are needed", prdc, *sets)
        refused("need as many samples", polynomial_mmd, *sets, 2, 2)
    refused("0 subsets of 9 samples", polynomial_mmd, rows, rows, 0, 9)
    refused(r"features have shape \(40,\)", prdc, rows[:, 0], rows)


def test_sets_that_allow_no_metric_are_refused():
    """One sample has neither statistics nor neighbours."""
    one = extract("one", [pixels(1)], Stub("scenes"))
    some = extract("some", [pixels(30)], Stub("scenes"))
    one.inception_score = None
    refused(
        "nothing can be measured of 'one' against 'some': 'one' has 1 sample: 2 at least",
        compare,
        one,
        some,
        Stub("scenes"),
    )


@pytest.mark.parametrize("value", (-0.5, math.nan, math.inf))
def test_invalid_covariances_are_refused(value):
    good = torch.eye(3, dtype=torch.float64)
    bad = torch.diag(torch.tensor([1.0, 1.0, value], dtype=torch.float64))
    for first, second in ((good, bad), (bad, good)):
        refused("covariance", frechet_distance, (torch.zeros(3), first), (torch.zeros(3), second))
    spiked = good.clone()
    spiked[0, 1] = spiked[1, 0] = 5.0  # a correlation of 5, which no vectors have
    refused("eigenvalue", frechet_distance, (torch.zeros(3), good), (torch.zeros(3), spiked))


def test_an_invalid_mean_is_refused():
    good = torch.eye(3)
    refused(
        "not finite|no mean",
        frechet_distance,
        (torch.full((3,), math.nan), good),
        (torch.zeros(3), good),
    )


def test_statistics_of_two_networks():
    refused("cannot be compared", frechet_distance, moments(gaussian(0)), moments(gaussian(0, d=5)))


def test_invalid_npz_files_are_refused(home):
    path = home / "samples.npz"
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=pixels(20).numpy())
    valid = buffer.getvalue()
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=np.zeros((20, 32, 32, 3), np.uint8))
    damaged = bytearray(packed.getvalue())
    damaged[60:90] = bytes(range(30))
    array = io.BytesIO()
    np.save(array, pixels(2).numpy())
    for content in (
        valid[:-100],
        valid[: len(valid) // 2],
        b"",
        b"no archive",
        bytes(damaged),
        array.getvalue(),
    ):
        path.write_bytes(content)
        refused("cannot be read as .npz", read_npz, path)
        refused("cannot be read as .npz", reference, path, Stub(), 32)
    np.savez(path, images=pixels(2).numpy())
    refused("has no arr_0.*it has images", lambda: list(npz_images(path)))
    for wrong in (
        pixels(2).numpy().astype(np.float32) / 255,
        pixels(2).numpy()[0],
        pixels(2).numpy().transpose(0, 3, 1, 2),
    ):
        np.savez(path, arr_0=wrong)
        refused("uint8 .N, H, W, 3.* is expected", lambda: list(npz_images(path)))
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    refused("cannot be read as .npz", read_npz, path)


def test_metrics_that_cannot_be_read(tiny):
    good = {"metric": "a", "value": 1.5, "protocol": {"step": 3}}
    kinds = (
        ("metric", 1),
        ("value", "1"),
        ("value", None),
        ("value", float("nan")),
        ("protocol", 3),
        ("protocol", {"step": "3"}),
    )
    wrong = [{key: value} for key, value in kinds]
    records = [[3], [{"metric": "a"}], {}, None, *([good, good | change] for change in wrong)]
    for content in ("[{", "\0", "", *map(json.dumps, records)):
        (tiny / "tiny" / "metrics.json").write_text(content)
        refused(
            "metrics.json cannot be read .*: restore it, or remove it",
            read_metrics,
            Run.open("tiny"),
        )
        refused("metrics.json cannot be read", evaluate_run, "tiny")
    assert not (
        tiny / "tiny" / "evaluation"
    ).exists()  # the error is raised before any sample is drawn
    (tiny / "tiny" / "metrics.json").write_text(json.dumps([good]), encoding="utf-16")
    assert read_metrics(Run.open("tiny")) == [good]


@pytest.fixture
def no_network(monkeypatch, home):
    """Refuse every socket; return the list of refused calls."""
    calls = []

    def refuse(*arguments, **keywords):
        calls.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return calls


def test_missing_weights_are_named(no_network, home, monkeypatch):
    about = r"weights-inception-2015-12-05-6726825d\.pth, 91 MB, of github\.com/toshas/torch-fidelity .*--weights PATH"
    refused(about, networks.Inception, offline=True)
    refused(f"is not there: {home}/none.pth.*{about}", networks.Inception, str(home / "none.pth"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(about, networks.Inception)
    assert not no_network
    monkeypatch.delenv("HF_HUB_OFFLINE")
    refused(f"could not be downloaded .no network in this test|{about}", networks.Inception)
    assert no_network
    assert not list((home / "cache").rglob("*.p*"))  # no partial file is left


def test_damaged_weights_are_refused(no_network, home):
    file = home / "cache" / networks.INCEPTION
    file.parent.mkdir()
    file.write_bytes(b"half a download")
    refused("is damaged", networks.Inception, offline=True)
    refused("cannot be read", networks.Inception, str(file))
    torch.save({"fc.weight": torch.zeros(2, 2)}, home / "other.pth")
    refused("do not fit|not Inception", networks.Inception, str(home / "other.pth"))


@pytest.mark.parametrize(
    "content", (b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"", b"\x1f\x8b")
)
def test_another_file_in_place_of_weights_is_named(content, home):
    (home / "weights.pth").write_bytes(content)
    reasons = {
        b"v": "a Git LFS pointer, not the weights: git lfs pull",
        b"<": "a web page",
        b"": "empty",
        b"\x1f": "an archive",
    }
    refused(
        f"weights.pth cannot be read: it is not a checkpoint.*{reasons[content[:1]]}",
        networks.Inception,
        str(home / "weights.pth"),
    )


def test_a_weight_file_runs_no_code(home):
    class Payload:
        def __reduce__(self):
            return Path.touch, (home / "ran",)

    torch.save({"fc.weight": torch.zeros(2), "payload": Payload()}, home / "bad.pth")
    refused("cannot be read", networks.Inception, str(home / "bad.pth"))
    assert not (home / "ran").exists()


# -- Inception -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of seeded tensors with the names and shapes of torch-fidelity's weights."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Blank(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    state = Blank(
        "inception", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth")
    ).state_dict()
    rng = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.dim() > 1:
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=rng)
        elif "var" in name or "bn.weight" in name:
            tensor.uniform_(0.5, 1.5, generator=rng)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=rng)
    torch.save(state, folder / "inception.pth")
    return str(folder / "inception.pth")


def test_inception_equals_torch_fidelitys(inception_weights, no_network):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = pixels(2)
    ours = networks.Inception(inception_weights)
    features = ours(images)
    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3(
        "inception", names, feature_extractor_weights_path=inception_weights
    )
    hooked = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: hooked.append(output)
    )
    pool, logits = theirs(images.permute(0, 3, 1, 2))
    assert {name: tuple(f.shape[1:]) for name, f in features.items()} == {
        "pool": (2048,),
        "spatial": (2023,),
        "logits": (1008,),
    }
    spatial = hooked[0][:, :7].flatten(1)
    torch.testing.assert_close(features["pool"], pool, rtol=0, atol=0)
    torch.testing.assert_close(features["logits"], logits, rtol=0, atol=0)
    torch.testing.assert_close(features["spatial"], spatial, rtol=0, atol=0)
    assert features["pool"].std() > 1e-3
    assert not torch.equal(features["pool"][0], features["pool"][1])
    # floats are rounded, because the graph takes uint8
    of_floats = ours(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(of_floats["pool"], pool, rtol=0, atol=0)
    refused("are expected", ours, torch.rand(1, 3, 32, 32) * 255)
    assert ours.protocol["interpolation"] == "bilinear, tf1" and not no_network

    of_torch = networks.Inception(inception_weights, resize="torch")
    assert of_torch.protocol != ours.protocol
    assert (of_torch(images)["pool"] - pool).abs().max() > 1e-3 * pool.abs().max()


def test_inception_loads_other_containers_and_refuses_infinite_weights(inception_weights, tmp_path):
    """A safetensors file and a file wrapped by a trainer give the same network; a tensor that is
    not finite is named.
    """
    tensors = torch.load(inception_weights, weights_only=True)
    images = pixels(1)
    expected = networks.Inception(inception_weights)(images)["pool"]
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 1},
        tmp_path / "b.pth",
    )
    for name in ("a.safetensors", "b.pth"):
        assert torch.equal(networks.Inception(str(tmp_path / name))(images)["pool"], expected)
    tensors["fc.weight"][0, 0] = float("inf")
    torch.save(tensors, tmp_path / "c.pth")
    refused(
        (
            "c.pth' are not all numbers that this Inception can have:\n  fc.weight holds infinity "
            "in 1 of"
        ),
        networks.Inception,
        str(tmp_path / "c.pth"),
    )


def test_rfid_is_computed_from_floats_without_rounding(
    inception_weights, tiny, monkeypatch, capsys
):
    """Reconstructions are resized as floats, as in pytorch-fid, and not as uint8 in the graph; the
    protocol states it.
    """
    options = few(
        network="inception", weights=inception_weights, reconstruction=True, reference_count=4
    )
    assert by_metric(evaluate_run("tiny", options)).keys() == {"psnr", "ssim", "l1"}
    message = "no rfid: 'tiny' has 4 samples: 2,049 at least are needed for pool"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(scores, "_distance", lambda *sets: (1.0, {}))
    entries = by_metric(evaluate_run("tiny", options))
    assert entries.keys() == {"psnr", "ssim", "l1", "rfid"}
    assert (
        entries["rfid"]["protocol"].items()
        >= {"interpolation": "bilinear, torch", "rounding": "none"}.items()
    )


def test_the_runs_teacher_is_the_default_space(tiny, monkeypatch):
    names = []
    monkeypatch.setattr(
        evaluation,
        "load_network_by_name",
        lambda name, *arguments, **keywords: names.append(name) or Unusable(),
    )
    with pytest.raises(ZeroDivisionError):
        evaluate_run("tiny", few(network=""))
    assert names == ["scenes"]


class Unusable:
    """A network that ends the evaluation at its first use."""

    def to(self, device):
        raise ZeroDivisionError
