"""What a checkpoint holds: its parts, our own file of them with its JSON card, and the way back to
a public one, bit for bit.

What a public file holds beside the weights we have a place for travels with them.
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

GEAR_PARTS = {  # the public GEAR's entries, stages 0 to 2, and what each is here
    "vq": "tokenizer",
    "vq_ema": "tokenizer_ema",
    "ar": "generator",
    "ema": "generator_ema",
    "projectors": "projector",
    "discriminator": "discriminator",
}
CONTAINERS = {
    "run": "a run",
    "gear": "a GEAR checkpoint",
    "model": "wrapped as 'model'",
    "module": "wrapped as 'module'",
    "state_dict": "wrapped as 'state_dict'",
    "lightning": "a Lightning file",
    "bare": "a bare state dict",
    "other": "wrapped by another trainer",
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm


@dataclass
class Part:
    """One network's weights: {our name: tensor}, the layout and size they speak of, and what the
    layout has beside them.
    """

    tensors: dict
    size: object = None  # TokenizerConfig, (GeneratorConfig, K), ...: what the layout builds from
    layout: Layout | None = None  # None: ours alone, as a network with a linear skip
    extras: dict = field(default_factory=dict)  # {public name: tensor}
    fault: str = ""  # why it cannot be taken
    # where it lay in the file of another trainer: keys and a prefix of names, as
    # 'state_dict/model.'
    place: str = ""

    @property
    def parameters(self):
        """The number of its parameters; BatchNorm's statistics are none."""
        return sum(t.numel() for n, t in self.tensors.items() if not n.endswith(STATISTICS))


@dataclass
class Checkpoint:
    """What a file or a run holds: parts "tokenizer", "tokenizer_ema", "generator", ...; `container`
    is how it was wrapped.
    """

    source: str
    container: str  # of CONTAINERS: how it is wrapped
    parts: dict
    step: int | None = None
    ignored: tuple = ()  # entries that are no network we know
    grid: tuple | None = None  # of the run's images
    precision: str = "float32"  # in which its tokenizer encodes

    def part(self, kind, ema=True):
        """Return (name, Part) of the network `kind`, averaged weights where there are any unless
        `ema` is false.
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
    """Make a Checkpoint of what `export` wrote, tensors with a JSON card; raises UserError where
    they do not fit each other.
    """
    groups = grouped(tensors)
    try:
        card = json.loads(card)
        grid, extras = card["grid"] and tuple(card["grid"]), grouped(groups.pop("extras", {}))
        parts = {
            n: _part_of_card(n, made_of, groups.pop(n, {}), extras.get(n, {}))
            for n, made_of in card["parts"].items()
        }
        precision = card.get("precision", "float32")
        checkpoint = Checkpoint(
            source, card["container"], parts, card["step"], grid=grid, precision=precision
        )
        if groups or card["container"] not in CONTAINERS:
            raise UserError(f"it does not speak of {', '.join(groups) or card['container']}")
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


def _part_of_card(name, made_of, tensors, extras):
    kind, layout = name.removesuffix("_ema"), made_of["layout"]
    if layout is not None:
        layout = {layout.name: layout for layout in LAYOUTS}[layout]
    size = _size_from_json(kind, made_of["size"])
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
    """Raise UserError for a size of more layers than there are tensors: to build them would take
    forever.
    """
    configs = size if isinstance(size, tuple) else (size,)
    for config in configs:
        depth = max(getattr(config, name, 0) for name in ("layers", "res_blocks"))
        if depth > len(tensors):
            raise UserError(f"{depth} layers are spoken of, and there are {len(tensors)} tensors")


def export(checkpoint, path):
    """Write a Checkpoint: to .safetensors with a JSON card, or else back to the public layout it
    has, in its own wrapping.

    Returns the names of parts left out, those for which the public layouts have no name. Raises
    UserError if all are.
    """
    path = Path(path)
    if faults := [part.fault for part in checkpoint.parts.values() if part.fault]:
        raise UserError(faults[0])
    kept = {name: part for name, part in checkpoint.parts.items() if part.layout is not None}
    if path.suffix == ".safetensors":
        kept, write = checkpoint.parts, lambda temporary: _write_safetensors(checkpoint, temporary)
    elif kept:
        write = lambda temporary: torch.save(_wrapped(checkpoint, kept), temporary)  # noqa: E731
    else:
        raise UserError(
            f"no public layout has a name for what '{checkpoint.source}' holds: export it as "
            ".safetensors."
        )
    try:
        write_atomically(path, write)
    except (
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have types of their own for a full disk
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]})") from None
    return sorted(checkpoint.parts.keys() - kept.keys())


def _write_safetensors(checkpoint, path):
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


def _wrapped(checkpoint, parts):
    """Put parts under their public names into the container they came in; those of a run or of
    another trainer into GEAR's.
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
