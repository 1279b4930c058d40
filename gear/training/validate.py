"""What a run measures of itself on the validation split while it trains; the same functions serve the analyses."""

import math

import torch

from gear.analysis import codes
from gear.evaluation.reconstruction import l1, psnr
from gear.training.losses import alignment_loss, next_token_loss

BATCH = 128


@torch.no_grad()
def tokenizer_metrics(tokenizer, images, tau):
    """Measure a tokenizer on images (N, 3, H, W): reconstruction, marginal usage, and the assignment at tau and at 1.

    Returns {name: float}; PSNR in dB, L1 in [0, 1] units, entropies in nats a token.
    """
    indices, quality, assignments = [], [], {"tau": [], "one": []}
    for chunk in images.split(BATCH):
        out = tokenizer(chunk)
        affinity, share = out.quantized.affinity, len(chunk) / len(images)
        indices.append(out.quantized.indices)
        quality.append(torch.stack([psnr(out.reconstruction, chunk), l1(out.reconstruction, chunk)]))
        for name, temperature in (("tau", tau), ("one", 1.0)):  # a chunk at a time: (N, K) is large
            assignment = codes.assignment(affinity.blocks(), temperature)
            values = {"entropy": assignment.entropy, **{f"top{m}": mass for m, mass in assignment.top_mass.items()}}
            assignments[name].append({key: share * value for key, value in values.items()})
    quality = torch.cat(quality, 1).mean(1)
    usage = codes.usage(torch.cat(indices), tokenizer.config.codebook_size)
    metrics = {
        "val/psnr": float(quality[0]),
        "val/l1": float(quality[1]),
        "val/usage_entropy": usage.entropy,
        "val/usage_size": usage.effective_size,
        "val/usage_dead": usage.dead,
        **{f"val/usage_top{m}": float(usage.top_mass[m - 1]) for m in (1, 10, 100) if m <= len(usage.top_mass)},
    }
    for name, parts in assignments.items():
        means = {key: sum(part[key] for part in parts) for key in parts[0]}
        metrics |= {f"val/assignment_{name}_{key}": value for key, value in means.items()}
        metrics[f"val/assignment_{name}_size"] = math.exp(means["entropy"])
    return metrics


@torch.no_grad()
def generator_metrics(generator, projector, tokenizer, images, labels, target, widths=None):
    """Measure a generator on images with their labels: next-token loss, and alignment where there is a projector.

    `target` are the teacher's features (N, L, C), or None; of several teachers, `widths` of them each. Returns {name: float},
    nats a token and minus a cosine.
    """
    ntp, align, tap, top = 0.0, 0.0, generator.config.tap_layer, generator.config.layers
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        indices = tokenizer.encode(images[rows]).flatten(1)
        share = len(indices) / len(images)
        hidden = generator.hidden(indices, labels[rows], [tap, top])
        ntp += share * float(next_token_loss(generator.logits(hidden[top]), indices))
        if projector is not None:
            align += share * float(alignment_loss(projector(hidden[tap]), target[rows], widths))
    return {"val/ntp_loss": ntp} | ({"val/align_loss": align} if projector is not None else {})
