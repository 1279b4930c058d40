"""Moran's I, the high-frequency ratio and iREPA's similarities against esda, an explicit DFT and
iREPA's code.
"""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from gear.measures import spatial
from gear.measures.spatial import high_frequency_ratio, local_similarity, morans_i

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
MORAN, FFT, PATCH = (
    {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN / file).items()}
    for file in ("moran.npz", "fft.npz", "patch.npz")
)
FIELDS = ("smooth8x8", "noise8x8", "ramp7x9", "checker8x8", "checker7x9", "spike5x6", "smooth16x16")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d):
    return torch.linalg.qr(gaussian(d, d, seed=1)).Q


def checkerboard(h, w):
    return ((-1.0) ** (torch.arange(h)[:, None] + torch.arange(w)))[None, :, :, None]


def blur(maps):
    """Average each token with its four neighbours on the torus."""
    return (maps + sum(maps.roll(s, axis) for s in (1, -1) for axis in (1, 2))) / 5


@pytest.mark.parametrize("name", FIELDS)
def test_moran_golden(name, device):
    expected = EXPECTED["moran"]["expected"][name]
    maps = MORAN[name][None, ..., None].to(device)
    for reduction in ("channel_mean", "vector"):
        result = morans_i(maps, reduction).item()
        assert result == pytest.approx(expected["rook_b"]["I"], abs=1e-10)
        for weights in {"queen_b", "rook_torus_b"} if name.startswith("smooth") else ():
            assert abs(result - expected[weights]["I"]) > 0.01


def test_moran_golden_map_drops_its_constant_channel():
    expected = EXPECTED["moran"]["expected"]["feature_map_8x8x6"]
    maps = MORAN["feature_map_8x8x6"][None]
    channels = [morans_i(maps[..., [c]]).item() for c in range(6)]
    per_channel = [channel["rook_b"] for channel in expected["per_channel_excluding_constant_ch5"]]
    assert channels[:5] == pytest.approx(per_channel, abs=1e-10) and np.isnan(channels[5])
    assert morans_i(maps).item() == pytest.approx(expected["channel_mean_rook_b"], abs=1e-10)
    assert morans_i(maps, "vector").item() == pytest.approx(
        expected["vector_moran_rook_b_from_esda_channels"], abs=1e-10
    )
    assert (
        abs(morans_i(maps).item() - expected["channel_mean_rook_r"]) > 0.02
    )  # that value has row-standardised weights, ours has binary ones


@pytest.mark.parametrize("grid", ((8, 8), (7, 9), (2, 5), (1, 5)))
def test_moran_of_a_checkerboard(grid):
    assert morans_i(checkerboard(*grid)).item() == pytest.approx(-1, abs=1e-12)


def test_moran_expectation_over_all_permutations():
    values = gaussian(6)
    maps = values[torch.tensor(list(permutations(range(6))))].view(720, 2, 3, 1)
    assert morans_i(maps).mean().item() == pytest.approx(-1 / 5, abs=1e-12)


def test_moran_expectation_over_random_permutations():
    tokens = blur(blur(gaussian(1, 7, 9, 5))).view(63, 5)
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([tokens[torch.randperm(63, generator=generator)] for _ in range(800)]).view(
        -1, 7, 9, 5
    )
    for reduction in ("channel_mean", "vector"):
        values = morans_i(maps, reduction)
        assert abs(values.mean() + 1 / 62) < 4 * values.std() / 800**0.5


def test_moran_invariances():
    maps = blur(gaussian(4, 7, 9, 5)) * torch.tensor([1, 2, 5, 10, 0.1])
    for reduction in ("channel_mean", "vector"):
        base = morans_i(maps, reduction)
        for transformed in (
            maps.flip(1),
            maps.flip(2),
            maps.transpose(1, 2),
            -3 * maps + torch.arange(5),
        ):
            torch.testing.assert_close(morans_i(transformed, reduction), base)
        with_constant = torch.cat([maps, torch.full_like(maps[..., :1], 0.1)], -1)
        torch.testing.assert_close(morans_i(with_constant, reduction), base)
        assert (
            morans_i(maps.reshape(4, 9, 7, 5), reduction) - base
        ).abs().max() > 0.05  # a wrong raster order changes the value
    torch.testing.assert_close(morans_i(maps @ rotation(5), "vector"), morans_i(maps, "vector"))
    assert (morans_i(maps @ rotation(5)) - morans_i(maps)).abs().max() > 1e-3
    torch.testing.assert_close(morans_i(maps * torch.tensor([9, 1, 3, 1, 2])), morans_i(maps))


def test_constant_images_alone_are_nan():
    maps = gaussian(20, 7, 9, 4)
    maps[5:] = maps[5:, :1, :1]  # the mean over 63 equal cells has a rounding error
    for values in (morans_i(maps), morans_i(maps, "vector"), high_frequency_ratio(maps)):
        assert values.isnan().tolist() == [False] * 5 + [True] * 15


def test_chunks_and_dtypes(monkeypatch):
    maps = gaussian(5, 8, 8, 3).to(torch.bfloat16)
    in_one_chunk = [morans_i(maps), high_frequency_ratio(maps), *local_similarity(maps)]
    monkeypatch.setattr(spatial, "CHUNK", 2 * 64**2)
    in_chunks = [morans_i(maps), high_frequency_ratio(maps), *local_similarity(maps.double())]
    for a, b in zip(in_one_chunk, in_chunks):
        assert a.dtype == torch.float64 and a.shape == (5,)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("m16", "m7x9"))
def test_high_frequency_golden(name, device):
    expected = EXPECTED["fft"]["expected"][name]
    maps = FFT[name][None].to(device)
    result = high_frequency_ratio(maps).item()
    assert result == pytest.approx(expected["PRIMARY radial>0.25 noDC pooled"], abs=1e-9)
    for definition in (
        "radial>0.25 withDC pooled",
        "chebyshev>0.25 noDC pooled",
        "radial>0.3535534 noDC pooled",
    ):
        assert abs(result - expected[definition]) > 0.02
    corner = high_frequency_ratio(maps, 0.3535534).item()
    assert corner == pytest.approx(expected["radial>0.3535534 noDC pooled"], abs=1e-9)
    if name == "m16":  # on a 7 x 9 grid no frequency lies on the circle
        assert abs(result - expected["radial>=0.25 noDC pooled"]) > 5e-3


def test_high_frequency_of_pure_tones():
    result = high_frequency_ratio(FFT["sines"].movedim(-1, 0)[..., None])
    assert result.tolist() == pytest.approx(
        EXPECTED["fft"]["expected"]["sines_per_channel_PRIMARY"]["values"], abs=1e-9
    )
    y, x = torch.arange(20)[:, None] / 20, torch.arange(20) / 20
    on_the_circle = (2 * torch.pi * (3 * y + 4 * x)).cos()[
        None, ..., None
    ]  # |f| = 0.25 up to rounding, which counts as low
    assert high_frequency_ratio(on_the_circle).item() < 1e-9


def test_high_frequency_of_white_noise():
    values = high_frequency_ratio(gaussian(400, 16, 16, 2))
    expected = EXPECTED["fft"]["expected"]["white_noise_expectation_16x16"][
        "PRIMARY radial>0.25 noDC"
    ]
    assert expected == 207 / 255 and abs(values.mean() - expected) < 4 * values.std() / 20


def test_high_frequency_invariances():
    maps = gaussian(4, 7, 9, 5)
    base = high_frequency_ratio(maps)
    for transformed in (
        maps + 100 * torch.arange(5),
        -3 * maps,
        maps.roll((2, 3), (1, 2)),
        maps @ rotation(5),
    ):
        torch.testing.assert_close(high_frequency_ratio(transformed), base)
    once = high_frequency_ratio(blur(maps))
    twice = high_frequency_ratio(blur(blur(maps)))
    assert (0 < twice).all() and (twice < once).all() and (once < base).all() and (base <= 1).all()


def test_high_frequency_is_the_share_of_energy():
    y, x = torch.arange(16)[:, None] / 16, torch.arange(16) / 16
    low = 3 * (2 * torch.pi * (y + 2 * x)).cos()[None, ..., None]
    high = 2 * (2 * torch.pi * (5 * y + 3 * x)).sin()[None, ..., None]
    share = high.square().sum() / (low.square().sum() + high.square().sum())
    assert high_frequency_ratio(low + high).item() == pytest.approx(share.item(), abs=1e-6)


def test_spectrum_gives_moran_on_the_torus():
    """Autocorrelation with the four neighbours equals the spectrum weighted by cosines, so both
    give the same number.
    """
    field = blur(gaussian(1, 7, 9, 1))[0, ..., 0]
    z = field - field.mean()
    power = torch.fft.fft2(z).abs().square()
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in z.shape)
    weight = ((2 * torch.pi * fy).cos()[:, None] + (2 * torch.pi * fx).cos()) / 2
    open_edges = 7 * 8 + 6 * 9
    torus_edges = 2 * 63
    wrap = (z[0] * z[-1]).sum() + (z[:, 0] * z[:, -1]).sum()
    torus = (
        (morans_i(field[None, ..., None]).item() * open_edges / 63 + wrap / z.square().sum())
        * 63
        / torus_edges
    )
    assert torus.item() == pytest.approx(
        (power * weight).sum().item() / power.sum().item(), abs=1e-12
    )


def test_local_similarity_golden():
    expected = EXPECTED["patch"]["expected"]["irepa_spatial_metrics_Y"]
    result = local_similarity(PATCH["Y"].view(6, 8, 8, 12))
    for values, key in zip(result, ("lds_far6", "cds_dmax8", "rmsc")):
        assert values.tolist() == pytest.approx(expected[key], abs=1e-5)


def test_local_similarity_identities():
    maps = blur(gaussian(3, 7, 9, 6)) + 1
    base = local_similarity(maps)
    scale = gaussian(3, 7, 9, 1).abs() + 0.1
    for transformed in (maps @ rotation(6), maps * scale, maps.flip(1), maps.transpose(1, 2)):
        for a, b in zip(local_similarity(transformed), base):
            torch.testing.assert_close(a, b)
    for value in local_similarity(torch.ones(1, 7, 9, 3)):
        assert value.item() == pytest.approx(0, abs=1e-7)
    board = local_similarity(torch.cat([checkerboard(8, 8), 0 * checkerboard(8, 8)], -1))
    parity = (-1.0) ** torch.arange(1, 9)
    slope = np.polyfit(np.arange(1, 9), parity.numpy(), 1)[0]
    assert board[1].item() == pytest.approx(-slope, abs=1e-9) and board[2].item() == pytest.approx(
        1, abs=1e-12
    )


@pytest.mark.parametrize(
    "call",
    (
        lambda: morans_i(gaussian(2, 4, 4, 3), "mean"),
        lambda: morans_i(gaussian(2, 1, 1, 3)),
        lambda: morans_i(gaussian(4, 4, 3)),
        lambda: morans_i(gaussian(2, 4, 4, 3) * torch.nan),
        lambda: high_frequency_ratio(gaussian(2, 4, 4, 3), 0.8),
        lambda: local_similarity(gaussian(2, 4, 4, 3)),
        lambda: local_similarity(torch.zeros(2, 8, 8, 3)),
    ),
)
def test_refuses(call):
    with pytest.raises(ValueError):
        call()
