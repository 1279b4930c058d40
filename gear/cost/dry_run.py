"""A text report of what runs would cost: `gear train NAME --dry-run`."""

import textwrap

from gear.config import UserError, check_value, nearest, require, to_dict
from gear.cost.price import GPUS, Utilisation, fewest_parts, price
from gear.runs.folder import run_path
from gear.runs.run import Run


def cost_report(name, config, gpu="h100", utilisation=0.4, accumulate=1):
    """Return a text that says what the run `name` would cost, its batch split into `accumulate`
    micro-batches.

    With "auto", there are as few micro-batches as fit on the GPU. On a GPU a large step is counted
    as compiled, as `gear train` executes it. For gpu "cpu" the text gives no hours.
    """
    cost = price(config, gpu in GPUS and not config.is_small)
    images = config.steps * config.batch_size
    num_fit = cost.images_that_fit(GPUS[gpu].gigabytes * 1e9) if gpu in GPUS else config.batch_size
    fewest = fewest_parts(config.batch_size, num_fit)
    accumulate = fewest or config.batch_size if accumulate == "auto" else accumulate
    head = f"{name}: stage {config.stage}, {config.steps:,} steps of {config.batch_size} images"
    lines = [
        head + (f", from {config.tokenizer_run}" if config.tokenizer_run else ""),
        *_resolved(config),
        "",
    ]
    lines.append("  part            parameters   bytes each")
    for part, n in cost.parameters.items():
        role = "trained" if part in cost.trained else "frozen"
        averaged = ", averaged" if part in cost.averaged else ""
        lines.append(f"  {part:13} {n:12,}   {cost.bytes_of(part):10}  {role}{averaged}")
    lines += [
        "",
        (
            "  update         part           mode       GFLOP forward    per step  MB saved   "
            "(per image)"
        ),
    ]
    for p in cost.passes:
        mode = p.mode + (f" x{p.times}" if p.times > 1 else "")
        saved = cost.saved_in(p) / 1e6
        lines.append(
            f"  {p.update:14} {p.part:14} {mode:10} {p.count.forward / 1e9:13.3f} "
            f"{p.training / 1e9:11.3f} {saved:9.2f}"
        )
    total = sum(p.training for p in cost.passes)
    lines.append(f"  {'total':40} {total / 1e9:25.3f}" + f"{total * images:14.3g} FLOP in the run")
    lines += [
        "",
        f"  memory, at least: {_memory(cost, config.batch_size // accumulate)}",
        *_gpu_lines(cost, config, gpu, utilisation, accumulate, num_fit, fewest),
    ]
    return "\n".join(lines)


def _memory(cost, batch):
    return (
        f"{cost.held / 1e9:.1f} GB held + {batch} images x ({cost.saved / 1e6:.1f} MB saved for "
        f"the backward pass + {cost.under_way / 1e6:.1f} MB of temporary gradients) = "
        f"{cost.memory(batch) / 1e9:.1f} GB"
    )


def _gpu_lines(cost, config, gpu, utilisation, accumulate, num_fit, fewest):
    """Return the lines that say whether a micro-batch fits on a GPU, and the hours."""
    if gpu not in GPUS:
        return [f"  hours on a {gpu}: not known, never measured"]
    card = GPUS[gpu]
    images = config.batch_size // accumulate
    fits = images <= num_fit
    verdict = "that fits" if fits else f"that does not fit, only {num_fit} images at once do"
    verdict += f": --accumulate {fewest}" if not fits and fewest else ""
    hours = cost.hours(config.steps * config.batch_size, gpu, utilisation)
    return [
        f"  {gpu}, {card.gigabytes} GB: {verdict}",
        f"  {gpu}, {card.bf16:g} TFLOP/s in bf16 and {card.float32:g} in float32, of which "
        f"{utilisation:.0%} is assumed: {hours:.3g} hours",
    ]


def _resolved(config):
    """Return all values of a Config as lines of text, one paragraph per section."""
    sections = {"run": {k: v for k, v in to_dict(config).items() if not isinstance(v, dict)}}
    sections |= {k: v for k, v in to_dict(config).items() if isinstance(v, dict)}
    lines = []
    for section, values in sections.items():
        values = ", ".join(f"{k} {v if v != '' else None}" for k, v in values.items())
        lines += textwrap.wrap(
            values, 118, initial_indent=f"  {section:10} ", subsequent_indent=" " * 13
        )
    return lines


def dry_run(planned, gpu="h100", utilisation=0.4, accumulate=1):
    """Print what each of the runs [(name, Config)] would cost, and their total; finished runs cost
    nothing.

    Raises UserError for an unknown GPU, a `utilisation` outside (0, 1], and an `accumulate` that
    does not divide the batch size.
    """
    if gpu not in (*GPUS, "cpu"):
        raise UserError(
            f"unknown GPU '{gpu}'.{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}, and cpu (without "
            "hours)."
        )
    check_value("utilisation", utilisation, Utilisation)
    hours = 0.0
    for name, config in planned:
        require(
            accumulate == "auto" or config.batch_size % accumulate == 0,
            f"accumulate is {accumulate}: it has to divide batch_size, which is "
            f"{config.batch_size} in {name}.",
        )
        run = Run(run_path(name))
        if run.exists and run.is_finished:
            print(f"{name}: finished\n")
            continue
        print(cost_report(name, config, gpu, utilisation, accumulate) + "\n")
        if gpu in GPUS:
            hours += price(config).hours(config.steps * config.batch_size, gpu, utilisation)
    print(f"all on one {gpu}: {hours:.3g} hours\n" * (gpu in GPUS) + CAVEAT)


CAVEAT = """\
This is an estimate. FLOPs are those of matrix products and convolutions, with attention counted
over all pairs and the adversarial term from the first step on; validation is not counted. The share
of the data sheet's rate that is reached is an assumption. Memory is the sum of weights, gradients,
Adam's moments, averages, the activations that autograd saves in the update that saves most, and
part of the temporary gradients of that update; the libraries' work space is not counted.
nothing was trained"""
