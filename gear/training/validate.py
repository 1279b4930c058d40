"""The metrics that a run computes on the validation split while it trains. The analyses use the
same functions.
"""

import math

import torch
from PIL import Image

from gear import data
from gear.generator.sampling import sample
from gear.images import image_grid
from gear.measures import codes
from gear.measures.reconstruction import l1, psnr
from gear.runs.run import PANEL_GAP, PANEL_WIDTH
from gear.training.losses import alignment_loss, next_token_loss

BATCH = 128


class Validation:
    """The metrics of a run on the first `eval_images` images of the validation split."""

    def __init__(self, state, source=None):
        config = state.config
        self.state = state
        self.tokenizer_results = None  # the last metrics and indices of `tokenizer_metrics`
        source = source or data.Source(config.data)
        self.classes = source.split("val").classes
        if state.generator is not None:
            data.check_classes(config.data, self.classes, config.generator.num_classes)
        images, labels = data.load(source, "val", config.eval_images)
        self.images, self.labels = images.to(state.device), labels.to(state.device)
        teacher = state.teacher_features
        with torch.no_grad():
            self.target = (
                None
                if teacher is None
                else torch.cat([teacher(x) for x in self.images.split(BATCH)])
            )

    def __call__(self):
        """Return the metrics of the current step, {name: float}."""
        state, config = self.state, self.state.config
        supervised_losses = (
            state.teacher.factor_losses
            if state.teacher is not None
            else state.detector.object_losses
            if state.detector is not None
            else None
        )
        if supervised_losses is not None:
            with torch.no_grad():
                losses = supervised_losses(self.images, self.labels)
            return {f"val/{name}": float(value) for name, value in losses.items()}
        averages = {name: average.module for name, average in state.averages.items()}
        tokenizer = averages.get("tokenizer", state.tokenizer)
        # a frozen tokenizer is measured only once
        if "tokenizer" in averages or self.tokenizer_results is None:
            self.tokenizer_results = tokenizer_metrics(tokenizer, self.images, config.objective.tau)
        metrics, indices = self.tokenizer_results
        if "generator" in averages:
            metrics = metrics | generator_metrics(
                averages["generator"],
                state.projector,
                indices,
                self.labels,
                self.target,
                state.widths,
            )
        return metrics

    def panel(self):
        """Draw a grid image: inputs, reconstructions and, with a generator, two rows of samples,
        one class per sample. Returns None for the run of a teacher or a detector.
        """
        state = self.state
        if state.tokenizer is None:
            return None
        tokenizer = (
            state.averages["tokenizer"].module if "tokenizer" in state.averages else state.tokenizer
        )
        images = self.images[torch.arange(PANEL_WIDTH) % len(self.images)]
        with torch.no_grad():
            rows = [images, tokenizer(images).reconstruction]
        if state.generator is not None:
            generator = state.averages["generator"].module
            labels = (
                torch.arange(2 * PANEL_WIDTH, device=state.device)
                % state.config.generator.num_classes
            )
            side = state.config.data.image_size // state.config.tokenizer.downsampling
            # float32 needs no copy of the generator, and without a graph no memory stays allocated
            settings = dict(seed=state.config.seed, dtype=torch.float32, graph=False)
            samples = sample(generator, tokenizer, labels, (side, side), **settings)
            rows.append(data.to_float(samples))
        grid = image_grid(torch.cat(rows).clamp(-1, 1), PANEL_WIDTH, PANEL_GAP)
        return Image.fromarray(data.to_uint8(grid[None])[0].cpu().numpy())


@torch.no_grad()
def tokenizer_metrics(tokenizer, images, tau):
    """Measure a tokenizer on images (N, 3, H, W): reconstruction quality, marginal code usage, and
    the soft assignment at temperatures tau and 1.

    Returns {name: float} and the indices (N, L). PSNR is in dB, L1 in units of [0, 1] images,
    entropies in nats per token.
    """
    indices = []
    quality = []
    assignments = {"tau": [], "one": []}
    for chunk in images.split(BATCH):
        out = tokenizer(chunk)
        affinity = out.quantized.affinity
        share = len(chunk) / len(images)
        indices.append(out.quantized.indices)
        quality.append(
            torch.stack([psnr(out.reconstruction, chunk), l1(out.reconstruction, chunk)])
        )
        # chunk by chunk, because the assignment of all images would be too large
        for name, temperature in (("tau", tau), ("one", 1.0)):
            assignment = codes.assignment(affinity.blocks(), temperature)
            values = {
                "entropy": assignment.entropy,
                **{f"top{m}": mass for m, mass in assignment.top_mass.items()},
            }
            assignments[name].append({key: share * value for key, value in values.items()})
    quality = torch.cat(quality, 1).mean(1)
    indices = torch.cat(indices)
    usage = codes.usage(indices, tokenizer.config.codebook_size)
    metrics = {
        "val/psnr": float(quality[0]),
        "val/l1": float(quality[1]),
        "val/usage_entropy": usage.entropy,
        "val/usage_size": usage.effective_size,
        "val/usage_dead": usage.dead,
        **{
            f"val/usage_top{m}": float(usage.top_mass[m - 1])
            for m in (1, 10, 100)
            if m <= len(usage.top_mass)
        },
    }
    for name, chunks in assignments.items():
        means = {key: sum(values[key] for values in chunks) for key in chunks[0]}
        metrics |= {f"val/assignment_{name}_{key}": value for key, value in means.items()}
        metrics[f"val/assignment_{name}_size"] = math.exp(means["entropy"])
    return metrics, indices


@torch.no_grad()
def generator_metrics(generator, projector, indices, labels, target, widths=None):
    """Measure a generator on indices (N, L) with labels (N,): its next-token loss and, with a
    projector, its alignment loss.

    The generator is the averaged one and the projector the live one, as in the public code.
    `target` holds the teacher's features (N, L, C), or is None; with several teachers, `widths`
    lists the channels of each. Returns {name: float}, in nats per token and as minus a cosine.
    """
    ntp, align = 0.0, 0.0
    tap, top = generator.config.tap_layer, generator.config.layers
    for start in range(0, len(indices), BATCH):
        rows = slice(start, start + BATCH)
        chunk = indices[rows]
        share = len(chunk) / len(indices)
        hidden = generator.hidden(chunk, labels[rows], [tap, top])
        ntp += share * float(next_token_loss(generator.logits(hidden[top]), chunk))
        if projector is not None:
            align += share * float(alignment_loss(projector(hidden[tap]), target[rows], widths))
    return {"val/ntp_loss": ntp} | ({"val/align_loss": align} if projector is not None else {})
