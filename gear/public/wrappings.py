"""Networks in the files of other trainers: in nested dictionaries, under names with a prefix, with
averaged weights beside or instead of the live ones.

A network is recognised by its tensor names alone, wherever it is in the file. The keys and prefixes
around it only decide whether it is an average.
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

AVERAGED = {  # words in a key or prefix that mark averaged weights
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
}
LIVE = {"current", "live", "online", "raw"}  # words that mark live weights
# prefix of the averages of LitEma, which taming-transformers, latent diffusion and Open-MAGVIT2 use
LITEMA = "model_ema"
LITEMA_NAME = re.compile(rf"{LITEMA}\.[^.]+$")


@dataclass(frozen=True)
class Network:
    """One network in a file."""

    keys: tuple  # keys that lead to its dictionary
    prefix: str  # text before the public names of its tensors
    averaged: bool  # whether these are averaged weights
    layout: Layout
    tensors: dict  # {public name: tensor}

    @property
    def name(self):
        """Its name as a part of a Checkpoint: "tokenizer", "tokenizer_ema", ..."""
        return self.layout.kind + ("_ema" if self.averaged else "")

    @property
    def place(self):
        """Its location in the file: 'ema', 'state_dict/model.', ''."""
        return "/".join(filter(None, [*self.keys, self.prefix]))


def read_checkpoint(path):
    """Read a file that `export` wrote, or one with tensors under public names, as a Checkpoint.

    No code in the file is run. Raises UserError for a file without a known network, or if none fits
    its layout. If only some do not fit, those are reported when they are requested, and the others
    still load.
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
    file_networks, ignored = networks(content, path.name)
    if not file_networks:
        raise UserError(_unknown(content, path))
    container = _container(file_networks)
    candidates = {}
    for network in file_networks:
        candidates.setdefault(network.name, []).append(network)
    order = [*GEAR_PARTS.values(), *sorted(candidates)]
    parts = {
        name: _choose_part(candidates[name], path.name, container)
        for name in sorted(candidates, key=order.index)
    }
    if all(part.fault for part in parts.values()):
        raise UserError(next(iter(parts.values())).fault)
    step = next(
        (content[key] for key in ("steps", "global_step", "step") if type(content.get(key)) is int),
        None,
    )
    return Checkpoint(path.name, container, parts, step, tuple(ignored))


# -- finding networks ------------------------------------------------------------------------------


def networks(content, source):
    """Return the Networks in nested dictionaries of tensors, and the names of the other entries.

    Raises UserError for a known network that gear does not have.
    """
    file_networks, ignored = [], []
    for keys, tensors in state_dicts(content):
        live, averages = _split_averages(tensors, source)
        for group, is_litema in ((live, False), (averages, True)):
            layouts = prefixes(group, source)
            file_networks += [
                _network(content, keys, prefix, group, layouts, is_litema) for prefix in layouts
            ]
            if layouts:
                ignored += [
                    "/".join([*keys, n.partition(".")[0]])
                    for n in group
                    if not n.startswith(tuple(layouts))
                ]
    keys_read = {network.keys[0] for network in file_networks if network.keys}
    ignored += [
        key
        for key, value in content.items()
        if key not in keys_read and not isinstance(value, torch.Tensor)
    ]
    nameless_places = nameless(content)
    remarks = {
        key: " (averages without names)"
        for key in ignored
        if any(f"{place}/".startswith(f"{key}/") for place in nameless_places)
    }
    return file_networks, [f"'{key}'{remarks.get(key, '')}" for key in dict.fromkeys(ignored)]


def _network(content, keys, prefix, group, layouts, is_litema):
    """Return the Network at one of the prefixes of {prefix: Layout} in {name: tensor} `group`."""
    inner_prefixes = tuple(p for p in layouts if p != prefix and p.startswith(prefix))
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in group.items()
        if name.startswith(prefix) and not name.startswith(inner_prefixes)
    }
    # torch.optim.swa_utils.AveragedModel has this counter beside the weights
    is_swa = tensors.pop("n_averaged", None) is not None
    # Lightning's WeightAveraging stores the live weights elsewhere
    is_lightning = keys == ("state_dict",) and "current_model_state" in content
    is_average = is_litema or is_swa or is_lightning or _is_averaged([*keys, *prefix.split(".")])
    file_prefix = f"{LITEMA}." if is_litema else f"{prefix}module." if is_swa else prefix
    return Network(keys, file_prefix, is_average, layouts[prefix], tensors)


def _split_averages(tensors, source):
    """Split a state dict into its live weights and LitEma's averages, both under the live names.

    LitEma removes the dots from the names, which are restored here. Tensors of a loss are left out.
    Raises UserError for averages of weights that the state dict does not have.
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
    name_lists = [list(live)]
    if not live:  # without live names, use those of the released tokenizer that fits best
        name_lists = [
            list(layout.names(size)[1])
            for layout in LAYOUTS
            if layout.kind == "tokenizer"
            for size in layout.sizes
        ]
    # LitEma may average a submodule of the saved module: its names then lack their first part
    without_first = lambda name: name.partition(".")[2]
    dotless = [  # {name without dots: name}, one for each list of names
        {f(n).replace(".", ""): n for f in (without_first, str) for n in names}
        for names in name_lists
    ]
    dotless = max(dotless, key=lambda names: len(names.keys() & averaged.keys()))
    unmatched = [
        n
        for n in averaged
        if n not in dotless and not n.startswith(("loss", "decay", "num_updates"))
    ]
    if live and unmatched:
        raise UserError(
            listed(f"'{source}' holds averages of weights that it does not hold", unmatched)
        )
    return live, {dotless[n]: t for n, t in averaged.items() if n in dotless}


def _is_averaged(labels):
    """Return whether keys and prefixes, from outermost to innermost, name an average.

    The innermost label with a word of AVERAGED or LIVE decides.
    """
    for label in reversed(labels):
        words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", label)}
        if words & (AVERAGED | LIVE):
            return not words & LIVE
    return False


def nameless(content, depth=4):
    """List the places of tensors that are in a list, without names.

    diffusers and torch_ema store averages in this form. A place is keys joined by "/".
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


# -- from networks to parts ------------------------------------------------------------------------


def _container(file_networks):
    """Return the key of CONTAINERS that says how the Networks of a file are wrapped."""
    places = {network.place: network.name for network in file_networks}
    if len(places) < len(file_networks):
        return "other"
    if all(GEAR_PARTS.get(place) == name for place, name in places.items()):
        return "gear"
    kind = file_networks[0].layout.kind
    live = {"state_dict": kind}
    averaged = {f"state_dict/{LITEMA}.": f"{kind}_ema"}
    patterns = {  # container -> the values of `places` that it may have
        "bare": ({"": kind},),
        "state_dict": (live,),
        "lightning": (live | averaged, averaged),
    }
    for key in ("model", "module"):
        patterns[key] = ({key: kind}, {key: kind, "ema": f"{kind}_ema"})
    return next((container for container, any_of in patterns.items() if places in any_of), "other")


def _choose_part(candidates, source, container):
    """Return one Part for the Networks of a file that have the same name: one that fits its layout.

    The Part has a `fault` if none fits, or if several fit and differ.
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
    if not all(_are_equal(fitting[0], part) for part in fitting[1:]):
        places = ", ".join(f"'{part.place}'" for part in fitting)
        fault = (
            f"'{source}' holds several networks of the kind {candidates[0].name}, {places}: save "
            "the one you mean alone."
        )
        return Part({}, layout=fitting[0].layout, fault=fault)
    return fitting[0]


def _are_equal(first, second):
    """Return whether two Parts have the same tensors."""
    names = first.tensors.keys()
    return names == second.tensors.keys() and all(
        torch.equal(first.tensors[n], second.tensors[n]) for n in names
    )


def _part(network, source):
    """Return the Part of a Network; `source` begins the message of its `fault`, if it has one."""
    layout, tensors = network.layout, network.tensors
    try:
        size, names = layout.fit({n: tuple(t.shape) for n, t in tensors.items()}, source)
    except UserError as error:
        return Part({}, layout=layout, fault=str(error))
    public_names = set(names.values())
    our_tensors = {n: tensors[public] for n, public in names.items() if public in tensors}
    # tensors that may hold integers
    integers = tuple(n for n in tensors if n not in public_names or n.endswith(STATISTICS))
    odd = odd_tensors(tensors, integers)
    fault = listed(f"{source} holds weights that are no floating-point numbers", odd) if odd else ""
    extras = {n: t for n, t in tensors.items() if n not in public_names}
    return Part(our_tensors, size, layout, extras, fault)


def _unknown(content, path):
    """Return the error message for a file in which no network is recognised."""
    if (path.parent / "state.json").exists():
        return (
            f"'{path}' holds the weights of a run, which is opened by its name: "
            f"{path.absolute().parents[2].name}."
        )
    if places := nameless(content):
        return (
            f"'{path.name}' holds averages without names ({', '.join(places[:3])}), from which the "
            "network cannot be recognised. Load them into their network, and save its state_dict()."
        )
    known = ", ".join(layout.name for layout in LAYOUTS)
    names = next((list(tensors) for _, tensors in state_dicts(content)), list(content))[:3]
    card = "no card of gear in its metadata, and " if is_safetensors(path) else ""
    return (
        f"'{path.name}' has {card}an unknown layout (it begins with "
        f"{', '.join(map(str, names)) or 'nothing'}). Known: {known}."
    )
