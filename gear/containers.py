"""Checkpoint files: what a public one wraps its networks in, ours with its JSON card, and the way back, bit for bit.

No code from a file is run. What a public file holds beside the weights we have a place for travels with them.
"""

import argparse
import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gear.config import UserError, __version__, from_dict, to_dict
from gear.generator.model import GeneratorConfig
from gear.home import write_atomically
from gear.layouts import LAYOUTS, Layout, recognise
from gear.tokenizer.autoencoder import TokenizerConfig

GEAR_PARTS = {  # the public GEAR's entries, stages 0 to 2, and what each is here
    "vq": "tokenizer", "vq_ema": "tokenizer_ema", "ar": "generator", "ema": "generator_ema", "projectors": "projector",
    "discriminator": "discriminator",
}  # fmt: skip
CONTAINERS = {
    "run": "a run", "gear": "a GEAR checkpoint", "model": "wrapped as 'model'", "module": "wrapped as 'module'",
    "state_dict": "wrapped as 'state_dict'", "lightning": "a Lightning file", "bare": "a bare state dict",
}  # fmt: skip


@dataclass
class Part:
    """One network's weights: {our name: tensor}, the layout and size they speak of, and what the layout has beside them."""

    tensors: dict
    size: object = None  # TokenizerConfig, (GeneratorConfig, K), ...: what the layout builds from
    layout: Layout | None = None  # None: ours alone, as a network with a linear skip
    extras: dict = field(default_factory=dict)  # {public name: tensor}

    @property
    def parameters(self):
        return sum(t.numel() for t in self.tensors.values())


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
                return name, self.parts[name]
        what = f"run '{self.source}'" if self.container == "run" else f"'{self.source}'"
        raise UserError(f"{what} holds no {order[-1]}: it holds {', '.join(sorted(self.parts)) or 'nothing'}.")


def read_public(path):
    """Read a .pt or .ckpt of a public layout; raises UserError for what is none. Nothing in it is executed."""
    container, entries, step = _unwrapped(_load(path), path.name)
    parts, ignored = {}, []
    for entry, tensors in entries.items():
        tensors = {_stripped(n): t for n, t in tensors.items()} if _is_state_dict(tensors) else {}
        layout = recognise(tensors, path.name)
        kind = GEAR_PARTS[entry] if container == "gear" else layout and layout.kind + entry
        if layout is None or layout.kind != kind.removesuffix("_ema"):
            ignored.append(entry or "the tensors")
            continue
        size, names = layout.fit({n: tuple(t.shape) for n, t in tensors.items()}, path.name)
        ours = {n: tensors[public] for n, public in names.items() if public in tensors}
        extras = {n: t for n, t in tensors.items() if n not in names.values()}
        parts[kind] = Part(ours, size, layout, extras)
    if not parts:
        known = ", ".join(layout.name for layout in LAYOUTS)
        found = ", ".join(list(next((t for t in entries.values() if isinstance(t, dict)), {}))[:3])
        raise UserError(f"'{path.name}' has an unknown layout (it begins with {found or 'nothing'}). Known: {known}.")
    return Checkpoint(path.name, container, parts, step, tuple(ignored))


def _load(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen's arguments: names and values, no code
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError:
        raise
    except Exception as error:  # torch has no one type for this
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            what = str(error).split("GLOBAL ")[-1].split(" ")[0]
            raise UserError(f"'{path.name}' holds Python code ({what}), which is not run: save its tensors alone.") from None
        what = "is cut short" if _is_zip(path) else "is not a checkpoint"
        raise UserError(f"'{path.name}' {what} ({why}). Fetch it again.") from None


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unwrapped(content, source):
    """Return (container, {entry: state dict}, step). Entries are the public GEAR's, or "" and "_ema" of the one network."""
    if not isinstance(content, dict):
        raise UserError(f"'{source}' is not a checkpoint: it holds one {type(content).__name__}.")
    step = next((content[key] for key in ("steps", "global_step") if isinstance(content.get(key), int)), None)
    if _is_state_dict(content):
        return "bare", {"": content}, None
    if _is_state_dict(content.get("state_dict")):
        return _lightning(content["state_dict"], step)
    for container in ("model", "module"):
        if container in content:
            return container, {"": content[container]} | ({"_ema": content["ema"]} if "ema" in content else {}), step
    return "gear", {key: content[key] for key in GEAR_PARTS if key in content}, step


def _lightning(tensors, step):
    """Part the live weights from LitEma's copies, whose names have lost their dots."""
    averaged = {n.removeprefix("model_ema."): t for n, t in tensors.items() if n.startswith("model_ema.")}
    live = {n: t for n, t in tensors.items() if not n.startswith(("model_ema.", "loss."))}
    if not averaged:
        return "state_dict", {"": live}, step
    dotless = {n.replace(".", ""): n for n in map(_stripped, live)}
    if not live:  # the names of the released tokenizer that has most of these
        sizes = ((layout, size) for layout in LAYOUTS if layout.kind == "tokenizer" for size in layout.sizes)
        known = [{n.replace(".", ""): n for n in layout.names(size)[1]} for layout, size in sizes]
        dotless = max(known, key=lambda names: len(names.keys() & averaged.keys()))
    ema = {dotless[n]: t for n, t in averaged.items() if n in dotless}
    return "lightning", ({"": live} if live else {}) | {"_ema": ema}, step


def _is_state_dict(content):
    return isinstance(content, dict) and bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())


def _stripped(name):
    """Take away what torch.compile and DistributedDataParallel put before a name."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def read_safetensors(path):
    """Read what `export` wrote: safetensors with a JSON card; raises UserError for what is none."""
    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {})["gear"])
            groups = grouped({name: file.get_tensor(name) for name in file.keys()})
        extras, parts = grouped(groups.pop("extras", {})), {}
        for name, made_of in card["parts"].items():
            size = _size_from_json(name.removesuffix("_ema"), made_of["size"])
            layout = next((layout for layout in LAYOUTS if layout.name == made_of["layout"]), None)
            parts[name] = Part(groups.get(name, {}), size, layout, extras.get(name, {}))
        return Checkpoint(path.name, card["container"], parts, card["step"], grid=card["grid"] and tuple(card["grid"]))
    except (KeyError, TypeError):
        raise UserError(f"'{path.name}' has no card of gear in its metadata: was it written by gear export?") from None
    except (OSError, UserError):
        raise
    except Exception as error:  # safetensors raises its own Rust exception type
        raise UserError(f"'{path.name}' cannot be read ({error}): it is cut short, or no safetensors file.") from None


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
    if path.suffix == ".safetensors":
        write_atomically(path, lambda temporary: _write_safetensors(checkpoint, temporary))
        return []
    kept = {name: part for name, part in checkpoint.parts.items() if part.layout is not None}
    if not kept:
        raise UserError(f"no public layout has a name for what '{checkpoint.source}' holds: export it as .safetensors.")
    write_atomically(path, lambda temporary: torch.save(_wrapped(checkpoint, kept), temporary))
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
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"gear": json.dumps(card)})


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
