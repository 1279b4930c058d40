"""Loading networks by a run's name or a file's path.

Loading is strict: one error lists every tensor that does not fit.
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
    """Load a tokenizer, frozen, in evaluation mode and float32.

    `source` is a run's name or a file of any known layout. Averaged weights are loaded where there
    are any, unless `ema` is false. From a run the newest checkpoint is loaded, or that of `step`.
    `tokenizer.source` describes the weights. Raises UserError for a file that is no checkpoint, has
    an unknown layout or is incomplete, and where there is no tokenizer.
    """
    checkpoint = open_checkpoint(source, step)
    name, part = checkpoint.part("tokenizer", ema)
    return _build(Tokenizer, (part.size, checkpoint.precision), checkpoint, name)


def load_generator(source, ema=True, step=None):
    """Load a generator, frozen, in evaluation mode and float32; see `load_tokenizer`.

    `generator.grid` is the token grid of the run's images, if known, and 16 x 16 otherwise.
    """
    checkpoint = open_checkpoint(source, step)
    name, part = checkpoint.part("generator", ema)
    build = functools.partial(Generator, grid=checkpoint.grid) if checkpoint.grid else Generator
    return _build(build, part.size, checkpoint, name)


def load_discriminator(source):
    """Load the PatchGAN of a public file, frozen and in training mode.

    In training mode its BatchNorm uses the statistics of the batch. Raises UserError where there is
    none, and for a run.
    """
    checkpoint = open_checkpoint(source)
    name, part = checkpoint.part("discriminator")
    if part.layout is None:
        raise UserError(
            f"the discriminator of '{source}' belongs to a run: it is loaded when the run is "
            f"trained further, gear train {source}."
        )
    return _build(part.layout.build, (part.size,), checkpoint, name).train()


def is_file(source):
    """Return whether `source` names a file of weights, which need not exist, and not a run."""
    path = Path(source).expanduser()
    if path.is_file():
        return True
    looks_like_file = path.suffix in WEIGHTS or len(path.parts) > 1
    return looks_like_file and str(source) not in run_names(str(source))


def tokenizer_start(source, frozen=False):
    """Return the tokenizer weights from which training continues, and the precision in which the
    tokenizer encodes.

    The weights are {"tokenizer", "tokenizer_ema", "discriminator": {name: tensor}} in float32.
    `source` is a run, or a file of any known layout. A file with live weights alone, or with
    averaged ones alone, gives the same weights for both entries. A file without a discriminator
    gives no such entry. With `frozen` the only entry is "tokenizer_ema", on which a generator is
    trained. Raises UserError as `load_tokenizer` does.
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
    return {name: _copy_tensors(part) for name, part in parts.items()}, checkpoint.precision


def _copy_tensors(part):
    """Return copies of a Part's tensors, {our name: tensor}, with floats as float32.

    They are copies because the file may be mapped into memory, and overwritten while a network is
    in use. BatchNorm's counters, which a file may lack, are added with the value 0: no output
    depends on them.
    """
    counters = {}
    for name in part.tensors:
        if name.endswith("running_mean"):
            counters[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return counters | {
        n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
        for n, t in part.tensors.items()
    }


def _build(build, arguments, checkpoint, name):
    """Return the network of the part `name`, built by `build(*arguments)`, frozen, with its weights
    and a description of them in `source`.
    """
    part = checkpoint.parts[name]
    with torch.device("meta"):
        module = build(*arguments)
    load_module(module, _copy_tensors(part), checkpoint.source, assign=True)
    step = "" if checkpoint.step is None else f", step {checkpoint.step}"
    place = f", from '{part.place}'" if part.place else ""
    module.source = (
        f"{name} of {checkpoint.source} "
        f"({part.layout.name if part.layout else 'gear'}{step}{place})"
    )
    return module.eval().requires_grad_(False)


def open_checkpoint(source, step=None):
    """Read a file, or a run by its name, as a Checkpoint.

    From a run the newest checkpoint is read, or that of `step`. Raises UserError where there is
    neither a file nor a run.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_checkpoint(path)
    if is_file(source):
        files = sorted(file.name for file in path.glob("*") if file.suffix in WEIGHTS)
        hint = f"; give a file in it, {', '.join(files[:3])}" if files else ""
        reason = (
            f"that is a folder; a run is opened by its name{hint}"
            if path.is_dir()
            else "there is no such file"
        )
        raise UserError(f"no checkpoint {path}: {reason}.")
    return _checkpoint_of_run(Run.open(str(source)), step)


def describe(checkpoint):
    """Describe a Checkpoint as text: its training step, and layout, sizes and number of parameters
    of each part.
    """
    step = "not recorded" if checkpoint.step is None else checkpoint.step
    lines = [f"{checkpoint.source}: {CONTAINERS[checkpoint.container]}, training step {step}"]
    for name, part in checkpoint.parts.items():
        if part.fault:
            lines.append(f"  {name:16} cannot be loaded: {part.fault}")
            continue
        layout = part.layout.name if part.layout else "gear's own"
        dtypes = ", ".join(
            sorted({str(t.dtype).removeprefix("torch.") for t in part.tensors.values() if t.ndim})
        )
        place = f", from '{part.place}'" if part.place else ""
        lines.append(
            f"  {name:16} {part.parameters:>13,} parameters, {dtypes}, layout: "
            f"{layout}{_describe_size(part.size)}{place}"
        )
        if faults := not_finite(part.tensors):
            lines.append(
                f"  {'':16} cannot be loaded: "
                f"{listed('there are weights that are not finite', faults)}"
            )
        if part.extras:
            lines.append(f"  {'':16} kept beside them: {', '.join(part.extras)}")
    lines += [f"  not read: {', '.join(checkpoint.ignored)}"] if checkpoint.ignored else []
    # a name may contain bytes that are not valid text, which printing would refuse
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _describe_size(size):
    """Describe the size of a tokenizer or a generator; returns "" for other networks."""
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


def _checkpoint_of_run(run, step=None):
    """Return the Checkpoint of a run; raises UserError for a configuration without a network."""
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
    ) as error:  # a configuration that describes no network
        raise UserError(
            f"{run.path / 'config.json'} is damaged ({first_line(error)}): restore it, or remove "
            "the run and train it again."
        ) from None
