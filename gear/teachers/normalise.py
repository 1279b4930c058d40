"""Normalisation of a teacher's features, before a cosine compares them with a projection."""

ALPHA = 0.6  # share of the mean that spatial normalisation subtracts


def channel_statistics(rows):
    """Return mean and standard deviation of each channel of rows (N, C): (C,), (C,)."""
    return rows.mean(0), rows.std(0).clamp_min(1e-6)


def spatially_normalised(features):
    """Return (z - 0.6 mean) / (std + 1e-6) of features z: (B, L, C) -> (B, L, C).

    Mean and unbiased standard deviation are taken over the L positions, per image and channel.
    """
    return (features - ALPHA * features.mean(1, keepdim=True)) / (
        features.std(1, keepdim=True) + 1e-6
    )
