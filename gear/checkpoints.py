"""Weights into networks, by a run's name or a file's path. Loading is strict: an error lists every
name that does not fit.
"""

import functools
from pathlib import Path

import torch

from gear.config import UserError, from_dict
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator
from gear.public.containers import CONTAINERS, Checkpoint, Part, check_depth
from gear.public.layouts import public_layout
from gear.public.tensorfiles import WEIGHTS, first_line
from gear.public.wrappings import read_checkpoint
from gear.runs.run import Run, run_names
from gear.tokenizer.config import TokenizerConfig, token_grid
from gear.tokenizer.model import Tokenizer
from gear.weights import listed, load_module, load_networks, not_finite


def load_tokenizer(source, ema=True, step=None):
    """Load a tokenizer from a run's name or a file of any known layout: evaluation mode, frozen,
    float32.

    Averaged weights are taken where there are any, unless `ema` is false; of a run the newest
    checkpoint, or that of `step`. `tokenizer.source` says what was taken. Raises UserError for what
    is no checkpoint, of an unknown layout, incomplete, or holds no tokenizer.
    """
    checkpoint = open_checkpoint(source, step)
    name, part = checkpoint.part("tokenizer", ema)
    return _built(Tokenizer, (part.size, checkpoint.precision), checkpoint, name)


def load_generator(source, ema=True, step=None):
    """Load a generator, as `load_tokenizer` does; `generator.grid` is the token grid of a run's
    images, 16 x 16 for a file.
    """
    checkpoint = open_checkpoint(source, step)
    name, part = checkpoint.part("generator", ema)
    build = functools.partial(Generator, grid=checkpoint.grid) if checkpoint.grid else Generator
    return _built(build, part.size, checkpoint, name)


def load_discriminator(source):
    """Load the PatchGAN of a public file, whose BatchNorm uses the batch's own statistics: training
    mode, frozen.
    """
    checkpoint = open_checkpoint(source)
    name, part = checkpoint.part("discriminator")
    if part.layout is None:
        raise UserError(
            f"the discriminator of '{source}' is a run's own: it comes back with the run, gear "
            f"train {source}."
        )
    return _built(part.layout.build, (part.size,), checkpoint, name).train()


def is_file(source):
    """Say whether `source` names a file of weights, there or not, and no run."""
    path = Path(source).expanduser()
    if path.is_file():
        return True
    looks_like_one = path.suffix in WEIGHTS or len(path.parts) > 1
    return looks_like_one and str(source) not in run_names(str(source))


def tokenizer_start(source, frozen=False):
    """Return the weights from which training goes on, {"tokenizer", "tokenizer_ema",
    "discriminator": {name: tensor}}, float32, and in which precision the tokenizer encodes.

    `source` is a run, or a file of any known layout. Where a file has live weights alone, or
    averaged ones alone, both entries are those; a file without a discriminator leaves that out.
    `frozen`: only "tokenizer_ema", which a generator is trained on. Raises UserError as
    `load_tokenizer` does.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.container == "run" and "tokenizer_ema" not in checkpoint.parts:
        names = ", ".join(sorted(checkpoint.parts)) or "nothing"
        raise UserError(f"run '{source}' holds no tokenizer_ema: it holds {names}.")
    parts = {"tokenizer_ema": checkpoint.part("tokenizer")[1]}
    if not frozen:
        is_live = "tokenizer" in checkpoint.parts
        parts["tokenizer"] = checkpoint.part("tokenizer", ema=not is_live)[1]
        if checkpoint.container == "run" or "discriminator" in checkpoint.parts:
            parts["discriminator"] = checkpoint.part("discriminator")[1]
    return {name: _copied(part) for name, part in parts.items()}, checkpoint.precision


def _copied(part):
    """Return a Part's tensors, float32, and the counters of BatchNorm that a file may lack, on
    which no output depends.

    They are copies, for the file may be mapped into memory, and be written again while a network is
    in use.
    """
    counters = {}
    for name in part.tensors:
        if name.endswith("running_mean"):
            counters[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return counters | {
        n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
        for n, t in part.tensors.items()
    }


def _built(build, arguments, checkpoint, name):
    part = checkpoint.parts[name]
    with torch.device("meta"):
        module = build(*arguments)
    load_module(module, _copied(part), checkpoint.source, assign=True)
    step = "" if checkpoint.step is None else f", step {checkpoint.step}"
    place = f", from '{part.place}'" if part.place else ""
    module.source = (
        f"{name} of {checkpoint.source} "
        f"({part.layout.name if part.layout else 'gear'}{step}{place})"
    )
    return module.eval().requires_grad_(False)


def open_checkpoint(source, step=None):
    """Read a file, or a run by its name (the newest checkpoint, or that of `step`): a Checkpoint.

    Raises UserError where there is neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_checkpoint(path)
    if is_file(source):
        files = sorted(file.name for file in path.glob("*") if file.suffix in WEIGHTS)
        inside = f"; give a file in it, {', '.join(files[:3])}" if files else ""
        what = (
            f"that is a folder; a run is opened by its name{inside}"
            if path.is_dir()
            else "there is no such file"
        )
        raise UserError(f"no checkpoint {path}: {what}.")
    return _of_run(Run.open(str(source)), step)


def describe(checkpoint):
    """Say what a Checkpoint holds, in lines: layout, sizes, parameters of each part, training
    step.
    """
    step = "not recorded" if checkpoint.step is None else checkpoint.step
    lines = [f"{checkpoint.source}: {CONTAINERS[checkpoint.container]}, training step {step}"]
    for name, part in checkpoint.parts.items():
        if part.fault:
            lines.append(f"  {name:16} cannot be taken: {part.fault}")
            continue
        layout = part.layout.name if part.layout else "gear's own"
        dtypes = ", ".join(
            sorted({str(t.dtype).removeprefix("torch.") for t in part.tensors.values() if t.ndim})
        )
        place = f", from '{part.place}'" if part.place else ""
        lines.append(
            f"  {name:16} {part.parameters:>13,} parameters, {dtypes}, layout: "
            f"{layout}{_described(part.size)}{place}"
        )
        if faults := not_finite(part.tensors):
            lines.append(
                f"  {'':16} cannot be taken: "
                f"{listed('there are weights that are no numbers', faults)}"
            )
        if part.extras:
            lines.append(f"  {'':16} kept beside them: {', '.join(part.extras)}")
    lines += [f"  not read: {', '.join(checkpoint.ignored)}"] if checkpoint.ignored else []
    # a name may be no Unicode text
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _described(size):
    if isinstance(size, TokenizerConfig):
        return f"; {size.codebook_size} codes of {size.code_dim}, downsampling {size.downsampling}"
    config, codes = size if size and isinstance(size[0], GeneratorConfig) else (None, None)
    if config is None:
        return ""
    condition = (
        f"captions of up to {config.text_slots}"
        if config.text_slots
        else f"{config.num_classes} classes"
    )
    return (
        f"; {config.layers} layers of {config.width}, {config.heads} heads, {codes} codes, "
        f"{condition}"
    )


# -- runs ------------------------------------------------------------------------------------------


def _of_run(run, step=None):
    groups, config = load_networks(run, step=step), run.config
    try:
        tokenizer = from_dict(TokenizerConfig, config["tokenizer"])
        sizes = {"tokenizer": tokenizer}
        sizes["generator"] = (
            from_dict(GeneratorConfig, config["generator"]),
            tokenizer.codebook_size,
        )
        parts = {}
        for name, tensors in groups.items():
            size = sizes.get(name.removesuffix("_ema"))
            check_depth(size, tensors)
            parts[name] = Part(tensors, size, public_layout(name.removesuffix("_ema"), size))
        precision = config.get("precision", "float32")
        return Checkpoint(
            run.name, "run", parts, step or run.step, grid=token_grid(config), precision=precision
        )
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        UserError,
        ValueError,
    ) as error:  # sizes that no network has
        raise UserError(
            f"{run.path / 'config.json'} is damaged ({first_line(error)}): restore it, or remove "
            "the run and train it again."
        ) from None
