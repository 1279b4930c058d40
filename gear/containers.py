"""Checkpoint files: what a public one wraps its networks in, ours with its JSON card, and the way back, bit for bit.

No code from a file is run. What a public file holds beside the weights we have a place for travels with them.
"""

import argparse
import dataclasses
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gear.config import UserError, __version__, from_dict, to_dict
from gear.generator.model import Generator, GeneratorConfig
from gear.home import write_atomically
from gear.layouts import LAYOUTS, recognise
from gear.layouts.base import Layout, listed, mismatches
from gear.tokenizer.autoencoder import TokenizerConfig
from gear.tokenizer.model import Tokenizer

GEAR_PARTS = {  # the public GEAR's entries, stages 0 to 2, and what each is here
    "vq": "tokenizer", "vq_ema": "tokenizer_ema", "ar": "generator", "ema": "generator_ema", "projectors": "projector",
    "discriminator": "discriminator",
}  # fmt: skip
CONTAINERS = {
    "run": "a run", "gear": "a GEAR checkpoint", "model": "wrapped as 'model'", "module": "wrapped as 'module'",
    "state_dict": "wrapped as 'state_dict'", "lightning": "a Lightning file", "bare": "a bare state dict",
}  # fmt: skip
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm


@dataclass
class Part:
    """One network's weights: {our name: tensor}, the layout and size they speak of, and what the layout has beside them."""

    tensors: dict
    size: object = None  # TokenizerConfig, (GeneratorConfig, K), ...: what the layout builds from
    layout: Layout | None = None  # None: ours alone, as a network with a linear skip
    extras: dict = field(default_factory=dict)  # {public name: tensor}
    fault: str = ""  # why it cannot be taken

    @property
    def parameters(self):
        """The number of its parameters; BatchNorm's statistics are none."""
        return sum(t.numel() for n, t in self.tensors.items() if not n.endswith(STATISTICS))


@dataclass
class Checkpoint:
    """What a file or a run holds: parts "tokenizer", "tokenizer_ema", "generator", ...; `container` is how it was wrapped."""

    source: str
    container: str  # of CONTAINERS: how it is wrapped
    parts: dict
    step: int | None = None
    ignored: tuple = ()  # entries that are no network we know
    grid: tuple | None = None  # of the run's images

    def part(self, kind, ema=True):
        """Return (name, Part) of the network `kind`, averaged weights where there are any unless `ema` is false."""
        order = [f"{kind}_ema", kind] if ema else [kind]
        for name in order:
            if name in self.parts:
                if self.parts[name].fault:
                    raise UserError(self.parts[name].fault)
                return name, self.parts[name]
        what = f"run '{self.source}'" if self.container == "run" else f"'{self.source}'"
        raise UserError(f"{what} holds no {order[-1]}: it holds {', '.join(sorted(self.parts)) or 'nothing'}.")


def read_public(path):
    """Read a .pt or .ckpt of a public layout; raises UserError for what is none. Nothing in it is executed.

    A part that does not fit its layout keeps the others from nothing: it says so when it is taken.
    """
    content = _load(path)
    container, entries, step = _unwrapped(content, path.name)
    parts, ignored = {}, [f"'{key}'" for key in content if container not in ("bare", "state_dict", "lightning")]
    for entry, tensors in entries.items():
        tensors = {_stripped(n): t for n, t in _tensors(tensors).items()}
        layout = recognise(tensors, path.name)
        kind = GEAR_PARTS[entry] if container == "gear" else layout and layout.kind + entry
        if layout is not None and layout.kind == kind.removesuffix("_ema"):
            parts[kind] = _part(layout, tensors, f"'{path.name}'" + (f", entry '{entry}'," if container == "gear" else ""))
            ignored = [key for key in ignored if key != f"'{_key(container, entry)}'"]
    if not parts:
        known = ", ".join(layout.name for layout in LAYOUTS)
        found = ", ".join(map(str, list(next(filter(None, map(_tensors, entries.values())), content))[:3]))
        raise UserError(f"'{path.name}' has an unknown layout (it begins with {found or 'nothing'}). Known: {known}.")
    if all(part.fault for part in parts.values()):
        raise UserError(next(iter(parts.values())).fault)
    return Checkpoint(path.name, container, parts, step, tuple(ignored))


def _part(layout, tensors, source):
    try:
        size, names = layout.fit({n: tuple(t.shape) for n, t in tensors.items()}, source)
    except UserError as error:
        return Part({}, layout=layout, fault=str(error))
    ours = {n: tensors[public] for n, public in names.items() if public in tensors}
    odd = [f"{names[n]} is {t.dtype}" for n, t in ours.items() if not t.is_floating_point() and not n.endswith(STATISTICS)]
    fault = listed(f"{source} holds weights that are no floating-point numbers", odd) if odd else ""
    return Part(ours, size, layout, {n: t for n, t in tensors.items() if n not in names.values()}, fault)


def _key(container, entry):
    """The key under which an entry lies in its file."""
    return entry if container == "gear" else {"": container, "_ema": "ema"}[entry]


def _load(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen's arguments: names and values, no code
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python objects ({held[1]})" if held else "what no checkpoint of tensors holds"
        raise UserError(f"'{path.name}' holds {what}, and nothing of that is run: save its tensors alone.") from None
    except Exception as error:  # torch has no one type for this
        cut = _is_zip(path) and "central directory" in str(error)
        raise UserError(f"'{path.name}' {'is cut short: fetch it again' if cut else 'is not a checkpoint'}.") from None


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unwrapped(content, source):
    """Return (container, {entry: state dict}, step). Entries are the public GEAR's, or "" and "_ema" of the one network."""
    if not isinstance(content, dict):
        raise UserError(f"'{source}' is not a checkpoint: it holds one {type(content).__name__}.")
    step = next((content[key] for key in ("steps", "global_step", "step") if isinstance(content.get(key), int)), None)
    if _tensors(content.get("state_dict")):
        return _lightning(_tensors(content["state_dict"]), step, source)
    for container in ("model", "module"):
        if container in content:
            return container, {"": content[container]} | ({"_ema": content["ema"]} if "ema" in content else {}), step
    if _tensors(content):
        return "bare", {"": content}, step
    return "gear", {key: content[key] for key in GEAR_PARTS if key in content}, step


def _lightning(tensors, step, source):
    """Part the live weights from LitEma's copies, whose names have lost their dots."""
    averaged = {
        n.removeprefix("model_ema.").replace("_orig_mod", ""): t for n, t in tensors.items() if n.startswith("model_ema.")
    }
    live = {n: t for n, t in tensors.items() if not n.startswith(("model_ema.", "loss."))}
    if not averaged:
        return "state_dict", {"": live}, step
    dotless = {n.replace(".", ""): n for n in map(_stripped, live)}
    if not live:  # the names of the released tokenizer that has most of these
        sizes = ((layout, size) for layout in LAYOUTS if layout.kind == "tokenizer" for size in layout.sizes)
        known = [{n.replace(".", ""): n for n in layout.names(size)[1]} for layout, size in sizes]
        dotless = max(known, key=lambda names: len(names.keys() & averaged.keys()))
    elsewhere = [n for n in averaged if n not in dotless and not n.startswith(("loss", "decay", "num_updates"))]
    if live and elsewhere:
        raise UserError(listed(f"'{source}' holds averages of weights that it does not hold", elsewhere))
    ema = {dotless[n]: t for n, t in averaged.items() if n in dotless}
    return "lightning", ({"": live} if live else {}) | {"_ema": ema}, step


def _tensors(content):
    """Return the tensors by name in a dictionary; none in anything else."""
    there = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in there if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _stripped(name):
    """Take away what torch.compile and DistributedDataParallel put into a name."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def read_safetensors(path):
    """Read what `export` wrote: safetensors with a JSON card; raises UserError for what is none, or does not fit its card."""
    try:
        with safe_open(path, "pt") as file:
            card = (file.metadata() or {}).get("gear")
            groups = grouped({name: file.get_tensor(name) for name in file.keys()})
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own Rust exception type
        raise UserError(f"'{path.name}' cannot be read ({error}): it is cut short, or no safetensors file.") from None
    if card is None:
        raise UserError(f"'{path.name}' has no card of gear in its metadata: was it written by gear export?")
    try:
        card = json.loads(card)
        grid, extras = card["grid"] and tuple(card["grid"]), grouped(groups.pop("extras", {}))
        parts = {n: _part_of_card(n, made_of, groups.pop(n, {}), extras.get(n, {})) for n, made_of in card["parts"].items()}
        checkpoint = Checkpoint(path.name, card["container"], parts, card["step"], grid=grid)
        if groups or card["container"] not in CONTAINERS:
            raise UserError(f"it does not speak of {', '.join(groups) or card['container']}")
        return checkpoint
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, UserError, ValueError) as error:
        raise UserError(f"the card of '{path.name}' does not fit its tensors: {error}. Export it again.") from None


def _part_of_card(name, made_of, tensors, extras):
    kind, layout = name.removesuffix("_ema"), made_of["layout"]
    if layout is not None:
        layout = {layout.name: layout for layout in LAYOUTS}[layout]
    size = _size_from_json(kind, made_of["size"])
    build = layout.build if layout else {"tokenizer": Tokenizer, "generator": lambda size: Generator(*size)}.get(kind)
    if build is not None:
        with torch.device("meta"):
            expected = {n: tuple(t.shape) for n, t in build(size).state_dict().items()}
        expected = {n: s for n, s in expected.items() if n in tensors or not n.endswith("num_batches_tracked")}
        if faults := mismatches(expected, {n: tuple(t.shape) for n, t in tensors.items()}):
            raise UserError(listed(f"the {name}", faults))
    return Part(tensors, size, layout, extras)


def grouped(tensors):
    groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def export(checkpoint, path):
    """Write a Checkpoint: to .safetensors with a JSON card, or else back to the public layout it has, in its own wrapping.

    Returns the names of parts left out, those for which the public layouts have no name. Raises UserError if all are.
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
        raise UserError(f"no public layout has a name for what '{checkpoint.source}' holds: export it as .safetensors.")
    try:
        write_atomically(path, write)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors have types of their own for a full disk
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]})") from None
    return sorted(checkpoint.parts.keys() - kept.keys())


def _write_safetensors(checkpoint, path):
    tensors = {f"{name}.{n}": t for name, part in checkpoint.parts.items() for n, t in part.tensors.items()}
    tensors |= {f"extras.{name}.{n}": t for name, part in checkpoint.parts.items() for n, t in part.extras.items()}
    parts = {n: {"layout": p.layout and p.layout.name, "size": _size_to_json(p.size)} for n, p in checkpoint.parts.items()}
    card = {
        "version": __version__, "source": checkpoint.source, "step": checkpoint.step,
        "container": "gear" if checkpoint.container == "run" else checkpoint.container,
        "grid": checkpoint.grid, "parts": parts,
    }  # fmt: skip
    save_file({n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, path, {"gear": json.dumps(card)})


def _wrapped(checkpoint, parts):
    """Put parts under their public names into the container they came in; those of a run into the public GEAR's."""
    entries = {}
    for name, part in parts.items():
        names, _ = part.layout.names(part.size)
        entries[name] = {names[n]: t for n, t in part.tensors.items()} | part.extras
    step = {} if checkpoint.step is None else {"steps": checkpoint.step}
    if checkpoint.container in ("run", "gear"):
        return {key: entries[name] for key, name in GEAR_PARTS.items() if name in entries} | step
    live = next((e for n, e in entries.items() if not n.endswith("_ema")), {})
    averaged = next((e for n, e in entries.items() if n.endswith("_ema")), {})
    if checkpoint.container == "bare":
        return live
    if checkpoint.container == "lightning":
        averaged = {f"model_ema.{n.replace('.', '')}": t for n, t in averaged.items()}
        return {"state_dict": live | averaged} | ({} if checkpoint.step is None else {"global_step": checkpoint.step})
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
