"""How a teacher's features are normalised before a cosine compares them with a projection."""

ALPHA = 0.6  # of the mean, which spatial normalisation takes away


def channel_statistics(rows):
    """Return mean and spread of each channel of rows (N, C): (C,), (C,)."""
    return rows.mean(0), rows.std(0).clamp_min(1e-6)


def spatially_normalised(features):
    """(z - 0.6 mean) / (std + 1e-6) of (B, L, C): statistics over L, of each image and channel; std
    is the unbiased one.
    """
    return (features - ALPHA * features.mean(1, keepdim=True)) / (
        features.std(1, keepdim=True) + 1e-6
    )
