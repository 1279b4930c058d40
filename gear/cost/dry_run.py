"""What runs would cost, in words: `gear train NAME --dry-run`."""

import textwrap

from gear.config import UserError, check_value, nearest, require, to_dict
from gear.cost.price import GPUS, Utilisation, fewest_parts, price
from gear.runs.folder import run_path
from gear.runs.run import Run


def told(name, config, gpu="h100", utilisation=0.4, accumulate=1):
    """Say what the run `name` would cost, its batch in `accumulate` parts, as text; on "cpu"
    without hours.

    With "auto" the parts are as few as fit on the GPU. A large step is compiled there, as `gear
    train` does it.
    """
    cost = price(config, gpu in GPUS and not config.is_small)
    images = config.steps * config.batch_size
    fit = cost.images_that_fit(GPUS[gpu].gigabytes * 1e9) if gpu in GPUS else config.batch_size
    fitting = fewest_parts(config.batch_size, fit)
    accumulate = fitting or config.batch_size if accumulate == "auto" else accumulate
    head = f"{name}: stage {config.stage}, {config.steps:,} steps of {config.batch_size} images"
    lines = [
        head + (f", from {config.tokenizer_run}" if config.tokenizer_run else ""),
        *_resolved(config),
        "",
    ]
    lines.append("  part            parameters   bytes each")
    for part, n in cost.parameters.items():
        learns = "trained" if part in cost.trained else "frozen"
        averaged = ", averaged" if part in cost.averaged else ""
        lines.append(f"  {part:13} {n:12,}   {cost.bytes_of(part):10}  {learns}{averaged}")
    lines += [
        "",
        (
            "  update         part           mode       GFLOP forward   in a step   MB kept   (an "
            "image)"
        ),
    ]
    for p in cost.passes:
        mode, times = p.mode, f" x{p.times}" if p.times > 1 else ""
        kept = cost.saved_in(p) / 1e6
        lines.append(
            f"  {p.update:14} {p.part:14} {mode + times:10} {p.count.forward / 1e9:13.3f} "
            f"{p.training / 1e9:11.3f} {kept:9.2f}"
        )
    total = sum(p.training for p in cost.passes)
    lines.append(f"  {'all':40} {total / 1e9:25.3f}" + f"{total * images:14.3g} FLOP in the run")
    lines += [
        "",
        f"  memory, at least: {_memory(cost, config.batch_size // accumulate)}",
        *_on(cost, config, gpu, utilisation, config.batch_size // accumulate, fit, fitting),
    ]
    return "\n".join(lines)


def _memory(cost, batch):
    return (
        f"{cost.held / 1e9:.1f} GB held + {batch} images x {cost.saved / 1e6:.1f} MB kept for the "
        "backward pass and "
        f"{cost.under_way / 1e6:.1f} MB of gradients under way = {cost.memory(batch) / 1e9:.1f} GB"
    )


def _on(cost, config, gpu, utilisation, at_once, fit, fitting):
    """Say whether so many images at once fit on a GPU, and the hours."""
    if gpu not in GPUS:
        return [f"  hours on a {gpu}: not known, nobody measured it"]
    card = GPUS[gpu]
    room = "that fits" if at_once <= fit else f"that does not fit, only {fit} images at once do"
    room += f": --accumulate {fitting}" if at_once > fit and fitting else ""
    hours = cost.hours(config.steps * config.batch_size, gpu, utilisation)
    return [
        f"  {gpu}, {card.gigabytes} GB: {room}",
        f"  {gpu}, {card.bf16:g} TFLOP/s in bf16 and {card.float32:g} in float32, of which "
        f"{utilisation:.0%} is assumed: {hours:.3g} hours",
    ]


def _resolved(config):
    """Spell a Config out, a section a line."""
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
    """Print what each of the runs [(name, Config)] would cost and all of them together; those that
    are finished cost nothing.

    Raises UserError for an unknown GPU, or a utilisation that is no share.
    """
    if gpu not in (*GPUS, "cpu"):
        raise UserError(
            f"unknown GPU '{gpu}'.{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}; cpu gives no "
            "hours."
        )
    check_value("utilisation", utilisation, Utilisation)
    hours = 0.0
    for name, config in planned:
        divides = (
            f"accumulate is {accumulate}: it has to divide batch_size, which is "
            f"{config.batch_size} "
            f"in {name}."
        )
        require(accumulate == "auto" or config.batch_size % accumulate == 0, divides)
        run = Run(run_path(name))
        if run.exists and run.is_finished:
            print(f"{name}: finished\n")
            continue
        print(told(name, config, gpu, utilisation, accumulate) + "\n")
        if gpu in GPUS:
            hours += price(config).hours(config.steps * config.batch_size, gpu, utilisation)
    print(f"all on one {gpu}: {hours:.3g} hours\n" * (gpu in GPUS) + CAVEAT)


CAVEAT = """\
This is an estimate. FLOPs are those of matrix products and convolutions, attention in full, the
adversarial term as if on from the start, without validation; the share of the data sheet that is
reached is an assumption; memory is weights, gradients, Adam's moments, averages, what autograd
keeps in the update that keeps most, and some of the gradients that are under way in it, without the
libraries' work space.
nothing was trained"""
