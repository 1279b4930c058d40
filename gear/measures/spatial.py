"""Smoothness of a feature map over the token grid: Moran's I, high-frequency ratio, and similarity
of near against distant tokens.

All functions take finite features (N, h, w, C) of any float dtype on any device, and raise
ValueError for others. They return one float64 value per image, on the CPU.
"""

from collections.abc import Iterator

import torch

from gear.measures.alignment import l2_normalise

CHUNK = 2**20  # feature values in float64 at a time: 8 MB, about the size of a cache
ROUNDING = 1e-12  # centred energy below this share of the raw energy is rounding, not variation
FAR = 6  # least distance of "distant" tokens in steps, as in iREPA's code
DISTANCES = 8  # the decay is fitted over the distances 1 to 8, as in iREPA's code


def morans_i(features: torch.Tensor, reduction: str = "channel_mean") -> torch.Tensor:
    """Measure spatial autocorrelation by Moran's I: (N, h, w, C) -> (N,) (Moran 1950; Fig. 5 c).

    I = (n / E) sum_edges z_i z_j / sum_i z_i^2 for n grid cells and E edges between horizontal and
    vertical neighbours, with an open boundary and z centred over the grid. The reduction
    "channel_mean" averages I over the channels that vary; "vector" pools numerator and denominator
    over channels, so that channels of large magnitude dominate. I is 1 for a smooth map,
    -1 / (n - 1) for a random one, -1 for a checkerboard, and NaN for a constant image. Raises
    ValueError for another reduction or a grid without edges.
    """
    if reduction not in ("channel_mean", "vector"):
        raise ValueError(f'reduction must be "channel_mean" or "vector", got {reduction!r}')
    return torch.cat([_morans_i(maps, reduction) for maps in _maps(features)]).cpu()


def high_frequency_ratio(features: torch.Tensor, cutoff: float = 0.25) -> torch.Tensor:
    """Return the share of non-constant spectral power above a radial frequency (Fig. 5 f).

    sum_{|f| > cutoff} P / sum_{f != 0} P with P(f) = sum_c |FFT_c(f)|^2 and f in cycles per token
    (Nyquist 0.5); the definition is ours. (N, h, w, C) -> (N,) in [0, 1]. White noise on 16 x 16
    tokens gives 207 / 255; a constant image gives NaN. Raises ValueError if the cutoff is outside
    [0, 0.71) or the grid is a single token.
    """
    if not 0 <= cutoff < 0.5**0.5:
        raise ValueError(f"cutoff={cutoff} is outside [0, 0.71)")
    return torch.cat([_high_frequency_ratio(maps, cutoff) for maps in _maps(features)]).cpu()


def local_similarity(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contrast near with distant tokens by iREPA's LDS, CDS and RMSC, with its code's constants.

    Let s(d) be the mean cosine of tokens whose rows and columns differ by d in total. LDS is s(1)
    minus the mean cosine of pairs with d >= 6. CDS is minus the least-squares slope of s over
    d = 1..8. RMSC is the rms distance of unit tokens from their mean, in [0, 1]. (N, h, w, C) ->
    three (N,). Raises ValueError if h + w < 10 or a token is zero.
    """
    maps = _maps(features)
    if sum(features.shape[1:3]) < DISTANCES + 2:
        raise ValueError(f"grid {tuple(features.shape[1:3])} has no tokens {DISTANCES} steps apart")
    return tuple(
        torch.cat(parts).cpu() for parts in zip(*(_local_similarity(chunk) for chunk in maps))
    )


def _maps(features: torch.Tensor) -> Iterator[torch.Tensor]:
    if features.ndim != 4 or features.shape[1] * features.shape[2] < 2:
        raise ValueError(f"need (N, h, w, C) with at least two tokens, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    # local_similarity forms (L, L) per image
    size = max(features[0].numel(), (features.shape[1] * features.shape[2]) ** 2)
    return (maps.double() for maps in features.split(max(1, CHUNK // size)))


def _centred(maps: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Subtract the mean over the grid; values without variation become exactly 0, not rounding
    errors.
    """
    centred = maps - maps.mean((1, 2), keepdim=True)
    energy, raw = (z.square().sum(axes, keepdim=True) for z in (centred, maps))
    return centred.masked_fill(energy <= ROUNDING * raw, 0)


def _morans_i(maps: torch.Tensor, reduction: str) -> torch.Tensor:
    _, h, w, _ = maps.shape
    z = _centred(maps, (1, 2))
    energy = z.square().sum((1, 2))  # (N, C)
    edges = (z[:, 1:] * z[:, :-1]).sum((1, 2)) + (z[:, :, 1:] * z[:, :, :-1]).sum((1, 2))  # (N, C)
    ratio = edges.sum(1) / energy.sum(1) if reduction == "vector" else (edges / energy).nanmean(1)
    return ratio * (h * w) / ((h - 1) * w + h * (w - 1))


def _high_frequency_ratio(maps: torch.Tensor, cutoff: float) -> torch.Tensor:
    # (N, h, w); it is 0 at f = 0
    power = torch.fft.fft2(_centred(maps, (1, 2, 3)), dim=(1, 2)).abs().square().sum(-1)
    fy, fx = (
        torch.fft.fftfreq(n, dtype=torch.float64, device=maps.device) for n in maps.shape[1:3]
    )
    high = torch.hypot(fy[:, None], fx) > cutoff
    return (power * high).sum((1, 2)) / power.sum((1, 2))


def _local_similarity(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, h, w, _ = maps.shape
    tokens = l2_normalise(maps).flatten(1, 2)  # (N, L, C)
    cell = torch.arange(h * w, device=maps.device)
    row = cell // w
    column = cell % w
    distance = ((row[:, None] - row).abs() + (column[:, None] - column).abs()).flatten()  # (L L,)
    num_pairs = torch.bincount(distance).double()
    sums = maps.new_zeros(n, len(num_pairs)).index_add(1, distance, (tokens @ tokens.mT).flatten(1))
    s = sums / num_pairs  # (N, h + w - 1): mean cosine at each distance
    d = torch.arange(1, DISTANCES + 1, device=maps.device).double()
    slope = (s[:, 1 : DISTANCES + 1] @ (d - d.mean())) / (d - d.mean()).square().sum()
    spread = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    return s[:, 1] - sums[:, FAR:].sum(1) / num_pairs[FAR:].sum(), -slope, spread
