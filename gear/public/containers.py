"""The contents of a checkpoint: its parts, gear's own file format with a JSON card, and the export
to a public file, bit for bit.

Tensors of a public file for which our networks have no parameter are stored with the part.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gear.config import UserError, __version__, from_dict, to_dict
from gear.files import write_atomically
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator
from gear.public.layout import Layout
from gear.public.layouts import LAYOUTS
from gear.tokenizer.config import TokenizerConfig
from gear.tokenizer.model import Tokenizer
from gear.weights import grouped, listed, mismatches

GEAR_PARTS = {  # entry of a public GEAR checkpoint, stages 0 to 2 -> name of our part
    "vq": "tokenizer",
    "vq_ema": "tokenizer_ema",
    "ar": "generator",
    "ema": "generator_ema",
    "projectors": "projector",
    "discriminator": "discriminator",
}
CONTAINERS = {  # how a checkpoint is wrapped -> its description
    "run": "a run",
    "gear": "a GEAR checkpoint",
    "model": "wrapped as 'model'",
    "module": "wrapped as 'module'",
    "state_dict": "wrapped as 'state_dict'",
    "lightning": "a Lightning file",
    "bare": "a bare state dict",
    "other": "wrapped by another trainer",
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's buffers


@dataclass
class Part:
    """The weights of one network, with its layout and size."""

    tensors: dict  # {our name: tensor}
    size: object = None  # argument of Layout.build: TokenizerConfig, (GeneratorConfig, K), ...
    layout: Layout | None = None  # None for a network without a public layout (linear skip)
    extras: dict = field(default_factory=dict)  # {public name: tensor} without a parameter of ours
    fault: str = ""  # why the part cannot be loaded; empty if it can
    # location in another trainer's file, keys and a prefix of names: 'state_dict/model.'
    place: str = ""

    @property
    def parameters(self):
        """The number of parameters; BatchNorm's statistics are not counted."""
        return sum(t.numel() for n, t in self.tensors.items() if not n.endswith(STATISTICS))


@dataclass
class Checkpoint:
    """The contents of a file or a run."""

    source: str  # name of the file or run
    container: str  # how it is wrapped, a key of CONTAINERS
    parts: dict  # {"tokenizer", "tokenizer_ema", "generator", ...: Part}
    step: int | None = None  # training step, if recorded
    ignored: tuple = ()  # entries in which no known network was recognised
    grid: tuple | None = None  # token grid (h, w) of the run's images
    precision: str = "float32"  # precision in which its tokenizer encodes

    def part(self, kind, ema=True):
        """Return (name, Part) of the network `kind`.

        Averaged weights are preferred, unless `ema` is false. Raises UserError where there is no
        such part or it cannot be loaded.
        """
        order = [f"{kind}_ema", kind] if ema else [kind]
        for name in order:
            if name in self.parts:
                if self.parts[name].fault:
                    raise UserError(self.parts[name].fault)
                return name, self.parts[name]
        what = f"run '{self.source}'" if self.container == "run" else f"'{self.source}'"
        raise UserError(
            f"{what} holds no {order[-1]}: it holds {', '.join(sorted(self.parts)) or 'nothing'}."
        )


def read_card(tensors, card, source):
    """Return the Checkpoint of a file that `export` wrote, from its tensors and its JSON card.

    Raises UserError where they do not fit each other.
    """
    groups = grouped(tensors)
    try:
        card = json.loads(card)
        grid = card["grid"] and tuple(card["grid"])
        extras = grouped(groups.pop("extras", {}))
        parts = {
            name: _part_of_card(name, entry, groups.pop(name, {}), extras.get(name, {}))
            for name, entry in card["parts"].items()
        }
        precision = card.get("precision", "float32")
        checkpoint = Checkpoint(
            source, card["container"], parts, card["step"], grid=grid, precision=precision
        )
        if groups or card["container"] not in CONTAINERS:
            raise UserError(f"it does not describe {', '.join(groups) or card['container']}")
        return checkpoint
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        UserError,
        ValueError,
    ) as error:
        raise UserError(
            f"the card of '{source}' does not fit its tensors: {error}. Export it again."
        ) from None


def _part_of_card(name, entry, tensors, extras):
    """Return the Part called `name` from its `entry` in a card; raises UserError if its tensors
    do not fit.
    """
    kind, layout = name.removesuffix("_ema"), entry["layout"]
    if layout is not None:
        layout = {layout.name: layout for layout in LAYOUTS}[layout]
    size = _size_from_json(kind, entry["size"])
    check_depth(size, tensors)
    build = (
        layout.build
        if layout
        else {"tokenizer": Tokenizer, "generator": lambda size: Generator(*size)}.get(kind)
    )
    if build is not None:
        with torch.device("meta"):
            expected = {n: tuple(t.shape) for n, t in build(size).state_dict().items()}
        expected = {
            n: s
            for n, s in expected.items()
            if n in tensors or not n.endswith("num_batches_tracked")
        }
        if faults := mismatches(expected, {n: tuple(t.shape) for n, t in tensors.items()}):
            raise UserError(listed(f"the {name}", faults))
    return Part(tensors, size, layout, extras)


def check_depth(size, tensors):
    """Raise UserError for a size with more layers than there are tensors, which would take forever
    to build.
    """
    configs = size if isinstance(size, tuple) else (size,)
    for config in configs:
        depth = max(getattr(config, name, 0) for name in ("layers", "res_blocks"))
        if depth > len(tensors):
            raise UserError(f"it describes {depth} layers, and there are {len(tensors)} tensors")


def export(checkpoint, path):
    """Write a Checkpoint to a file.

    A path that ends in .safetensors gives gear's own format, with all parts and a JSON card. Any
    other path gives public names in the wrapping that the checkpoint had. Parts without a public
    layout are then left out, and their names are returned. Raises UserError if no part is left.
    """
    path = Path(path)
    if faults := [part.fault for part in checkpoint.parts.values() if part.fault]:
        raise UserError(faults[0])
    parts = {name: part for name, part in checkpoint.parts.items() if part.layout is not None}
    if path.suffix == ".safetensors":
        parts = checkpoint.parts
        write = lambda temporary: _write_safetensors(checkpoint, temporary)  # noqa: E731
    elif parts:
        write = lambda temporary: torch.save(_wrap(checkpoint, parts), temporary)  # noqa: E731
    else:
        raise UserError(
            f"no public layout fits a network of '{checkpoint.source}': export it as .safetensors."
        )
    try:
        write_atomically(path, write)
    # torch and safetensors raise errors of these types for a full disk
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]})") from None
    return sorted(checkpoint.parts.keys() - parts.keys())


def _write_safetensors(checkpoint, path):
    """Write all parts of a Checkpoint as a .safetensors file whose metadata is the JSON card."""
    tensors = {
        f"{name}.{n}": t for name, part in checkpoint.parts.items() for n, t in part.tensors.items()
    }
    tensors |= {
        f"extras.{name}.{n}": t
        for name, part in checkpoint.parts.items()
        for n, t in part.extras.items()
    }
    parts = {
        n: {"layout": p.layout and p.layout.name, "size": _size_to_json(p.size)}
        for n, p in checkpoint.parts.items()
    }
    card = {
        "version": __version__, "source": checkpoint.source, "step": checkpoint.step,
        "container": "gear" if checkpoint.container == "run" else checkpoint.container,
        "grid": checkpoint.grid, "precision": checkpoint.precision, "parts": parts,
    }  # fmt: skip
    save_file(
        {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()},
        path,
        {"gear": json.dumps(card)},
    )


def _wrap(checkpoint, parts):
    """Return the content of a public file: the parts under public names, in their container.

    The parts of a run or of another trainer's file are wrapped as a GEAR checkpoint.
    """
    entries = {}
    for name, part in parts.items():
        names, _ = part.layout.names(part.size)
        entries[name] = {names[n]: t for n, t in part.tensors.items()} | part.extras
    step = {} if checkpoint.step is None else {"steps": checkpoint.step}
    if checkpoint.container in ("run", "gear", "other"):
        return {key: entries[name] for key, name in GEAR_PARTS.items() if name in entries} | step
    live = next((e for n, e in entries.items() if not n.endswith("_ema")), {})
    averaged = next((e for n, e in entries.items() if n.endswith("_ema")), {})
    if checkpoint.container == "bare":
        return live
    if checkpoint.container == "lightning":
        averaged = {f"model_ema.{n.replace('.', '')}": t for n, t in averaged.items()}
        return {"state_dict": live | averaged} | (
            {} if checkpoint.step is None else {"global_step": checkpoint.step}
        )
    return {checkpoint.container: live} | ({"ema": averaged} if averaged else {}) | step


def _size_to_json(size):
    if isinstance(size, tuple):
        return [_size_to_json(item) for item in size]
    return to_dict(size) if dataclasses.is_dataclass(size) else size


def _size_from_json(kind, size):
    if kind == "tokenizer":
        return from_dict(TokenizerConfig, size)
    if kind == "generator":
        return from_dict(GeneratorConfig, size[0]), size[1]
    return size and tuple(tuple(item) if isinstance(item, list) else item for item in size)
