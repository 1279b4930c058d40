"""Files of networks that others wrote: in nested dictionaries, under names with a prefix, averages
beside or instead of live.

A network is told by its names alone, wherever it lies; what is around it is only read for whether
it is an average.
"""

import re
from dataclasses import dataclass

import torch

from gear.config import UserError
from gear.public.containers import GEAR_PARTS, STATISTICS, Checkpoint, Part, read_card
from gear.public.layout import Layout
from gear.public.layouts import LAYOUTS, prefixes
from gear.public.tensorfiles import (
    ASIDE,
    NotWeights,
    is_safetensors,
    read_content,
    read_safetensors,
    state_dicts,
    stripped,
)
from gear.weights import listed, odd_tensors

AVERAGED = {
    "average",
    "averaged",
    "averages",
    "averaging",
    "avg",
    "ema",
    "emamodel",
    "polyak",
    "shadow",
    "swa",
}  # words
LIVE = {"current", "live", "online", "raw"}
# entries in which moments bear the names of weights
LITEMA = "model_ema"  # as taming-transformers, latent diffusion and Open-MAGVIT2 call theirs
LITEMA_NAME = re.compile(rf"{LITEMA}\.[^.]+$")


@dataclass(frozen=True)
class Network:
    """One network in a file: the keys of the dictionaries around it, the prefix of its names, and
    its tensors without that.
    """

    keys: tuple
    prefix: str
    averaged: bool
    layout: Layout
    tensors: dict  # {public name: tensor}

    @property
    def name(self):
        """What it is called as a part of a Checkpoint."""
        return self.layout.kind + ("_ema" if self.averaged else "")

    @property
    def place(self):
        """Where it lies: 'ema', 'state_dict/model.', ''."""
        return "/".join(filter(None, [*self.keys, self.prefix]))


def read_checkpoint(path):
    """Read a file of networks: what `export` wrote, or tensors under public names; no code in it is
    run.

    Raises UserError for what is none. A part that does not fit its layout is reported only when it
    is taken; the others load.
    """
    try:
        if is_safetensors(path):
            content, metadata = read_safetensors(path)
            if "gear" in metadata:
                return read_card(content, metadata["gear"], path.name)
        else:
            content = read_content(path)
        if not isinstance(content, dict):
            raise NotWeights(f"is not a checkpoint: it holds one {type(content).__name__}")
    except NotWeights as error:
        raise UserError(f"'{path.name}' {error}.") from None
    found, ignored = networks(content, path.name)
    if not found:
        raise UserError(_unknown(content, path))
    container, several = _container(found), {}
    for network in found:
        several.setdefault(network.name, []).append(network)
    order = [*GEAR_PARTS.values(), *sorted(several)]
    parts = {
        name: _chosen(several[name], path.name, container)
        for name in sorted(several, key=order.index)
    }
    if all(part.fault for part in parts.values()):
        raise UserError(next(iter(parts.values())).fault)
    step = next(
        (content[key] for key in ("steps", "global_step", "step") if type(content.get(key)) is int),
        None,
    )
    return Checkpoint(path.name, container, parts, step, tuple(ignored))


# -- where networks lie ----------------------------------------------------------------------------


def networks(content, source):
    """Return the Networks in nested dictionaries of tensors, and the entries in which there is
    none.

    Raises UserError for a network that is known and has no counterpart here.
    """
    found, ignored = [], []
    for keys, tensors in state_dicts(content):
        live, averages = _parted(tensors, source)
        for group, litema in ((live, False), (averages, True)):
            places = prefixes(group, source)
            for place in places:
                deeper = tuple(
                    other for other in places if other != place and other.startswith(place)
                )
                names = [
                    name for name in group if name.startswith(place) and not name.startswith(deeper)
                ]
                own = {name.removeprefix(place): group[name] for name in names}
                swa = own.pop("n_averaged", None) is not None  # torch.optim.swa_utils.AveragedModel
                # its WeightAveraging
                lightning = keys == ("state_dict",) and "current_model_state" in content
                prefix = f"{LITEMA}." if litema else f"{place}module." if swa else place
                averaged = litema or swa or lightning or _is_averaged([*keys, *place.split(".")])
                found.append(Network(keys, prefix, averaged, places[place], own))
            if places:
                ignored += [
                    "/".join([*keys, n.partition(".")[0]])
                    for n in group
                    if not n.startswith(tuple(places))
                ]
    read = {network.keys[0] for network in found if network.keys}
    ignored += [
        key
        for key, value in content.items()
        if key not in read and not isinstance(value, torch.Tensor)
    ]
    unnamed = nameless(content)
    about = {
        key: " (averages without names)"
        for key in ignored
        if any(f"{place}/".startswith(f"{key}/") for place in unnamed)
    }
    return found, [f"'{key}'{about.get(key, '')}" for key in dict.fromkeys(ignored)]


def _parted(tensors, source):
    """Part a state dict into its weights and LitEma's averages, under the names of the live ones.

    The averages' own names have no dots. What a loss holds is left out.
    """
    averaged = {
        n.removeprefix(f"{LITEMA}.").replace("_orig_mod", ""): t
        for n, t in tensors.items()
        if LITEMA_NAME.match(n)
    }
    live = stripped(
        {
            n: t
            for n, t in tensors.items()
            if not LITEMA_NAME.match(n) and not re.search(r"(^|\.)loss\.", n)
        }
    )
    if not averaged:
        return live, {}
    known = [list(live)]
    if not live:  # the names of the released tokenizer that has most of these
        known = [
            list(layout.names(size)[1])
            for layout in LAYOUTS
            if layout.kind == "tokenizer"
            for size in layout.sizes
        ]
    # LitEma may be of what lies in the module that is saved
    inner = lambda name: name.partition(".")[2]
    dotless = [{f(n).replace(".", ""): n for f in (inner, str) for n in names} for names in known]
    dotless = max(dotless, key=lambda names: len(names.keys() & averaged.keys()))
    elsewhere = [
        n
        for n in averaged
        if n not in dotless and not n.startswith(("loss", "decay", "num_updates"))
    ]
    if live and elsewhere:
        raise UserError(
            listed(f"'{source}' holds averages of weights that it does not hold", elsewhere)
        )
    return live, {dotless[n]: t for n, t in averaged.items() if n in dotless}


def _is_averaged(places):
    """Say whether keys and prefixes, from the outermost to the innermost, speak of an average."""
    for place in reversed(places):
        words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", place)}
        if words & (AVERAGED | LIVE):
            return not words & LIVE
    return False


def nameless(content, depth=4):
    """List the places at which tensors lie in a list, without names, as diffusers' and torch_ema's
    averages do.
    """
    places = []
    for key, value in content.items() if depth else ():
        if (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(v, torch.Tensor) for v in value)
        ):
            places.append(f"{key}")
        elif isinstance(value, dict) and not ASIDE.match(f"{key}"):
            places += [f"{key}/{place}" for place in nameless(value, depth - 1)]
    return places


# -- what they are ---------------------------------------------------------------------------------


def _container(found):
    """Say how the Networks of a file are wrapped: one of CONTAINERS."""
    places = {network.place: network.name for network in found}
    if len(places) < len(found):
        return "other"
    if all(GEAR_PARTS.get(place) == name for place, name in places.items()):
        return "gear"
    kind = found[0].layout.kind
    live, averaged = {"state_dict": kind}, {f"state_dict/{LITEMA}.": f"{kind}_ema"}
    shapes = {
        "bare": ({"": kind},),
        "state_dict": (live,),
        "lightning": (live | averaged, averaged),
    }
    shapes |= {key: ({key: kind}, {key: kind, "ema": f"{kind}_ema"}) for key in ("model", "module")}
    return next((container for container, alike in shapes.items() if places in alike), "other")


def _chosen(candidates, source, container):
    """Return the Part of those Networks of a file that have one name: of the one that fits its
    layout.
    """
    parts = []
    for network in candidates:
        entry = (
            f", entry '{network.place}',"
            if container in ("gear", "other") and network.place
            else ""
        )
        parts.append(_part(network, f"'{source}'{entry}"))
        parts[-1].place = network.place if container == "other" else ""
    fitting = [part for part in parts if not part.fault] or parts[:1]
    if not all(_same(fitting[0], other) for other in fitting[1:]):
        places = ", ".join(f"'{part.place}'" for part in fitting)
        fault = (
            f"'{source}' holds several networks of the kind {candidates[0].name}, {places}: save "
            "the one you mean alone."
        )
        return Part({}, layout=fitting[0].layout, fault=fault)
    return fitting[0]


def _same(part, other):
    names = part.tensors.keys()
    return names == other.tensors.keys() and all(
        torch.equal(part.tensors[n], other.tensors[n]) for n in names
    )


def _part(network, source):
    layout, tensors = network.layout, network.tensors
    try:
        size, names = layout.fit({n: tuple(t.shape) for n, t in tensors.items()}, source)
    except UserError as error:
        return Part({}, layout=layout, fault=str(error))
    public = set(names.values())
    ours = {n: tensors[public] for n, public in names.items() if public in tensors}
    # may be whole numbers
    whole = tuple(n for n in tensors if n not in public or n.endswith(STATISTICS))
    odd = odd_tensors(tensors, whole)
    fault = listed(f"{source} holds weights that are no floating-point numbers", odd) if odd else ""
    return Part(ours, size, layout, {n: t for n, t in tensors.items() if n not in public}, fault)


def _unknown(content, path):
    """Say what a file holds in which no network is recognised."""
    if (path.parent / "state.json").exists():
        return (
            f"'{path}' holds the weights of a run, which is opened by its name: "
            f"{path.absolute().parents[2].name}."
        )
    if places := nameless(content):
        return (
            f"'{path.name}' holds averages without names ({', '.join(places[:3])}), which tell no "
            "network. Load them into the "
            f"one that they are of, and save its state_dict()."
        )
    known = ", ".join(layout.name for layout in LAYOUTS)
    names = next((list(tensors) for _, tensors in state_dicts(content)), list(content))[:3]
    card = "no card of gear in its metadata, and " if is_safetensors(path) else ""
    return (
        f"'{path.name}' has {card}an unknown layout (it begins with "
        f"{', '.join(map(str, names)) or 'nothing'}). Known: {known}."
    )
