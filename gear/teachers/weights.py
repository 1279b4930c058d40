"""Weights that others published: a file by its path, else from a cache, else downloaded; no code in
it is run.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import torch

from gear.config import UserError
from gear.files import cache_dir
from gear.public.tensorfiles import (
    NotWeights,
    first_line,
    read_content,
    state_dicts,
    stripped,
    tensors_of,
)

FILE = "model.safetensors"  # as the hub's repositories call it
DEPTH = 4  # of wrappers within each other
# entries that go before others under which a file may keep its tensors
WRAPPERS = ("state_dict", "model", "teacher", "ema_encoder")


def is_offline(asked=False):
    """Tell whether no network call may be made: asked for, or $HF_HUB_OFFLINE is set."""
    return asked or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def find_weights(teacher, repo, about, path="", offline=False, flag="", file=FILE):
    """Return a file of a network: `path` (or `file` in that folder), else of `repo` in a cache,
    else downloaded.

    `repo` is the hub's, or the address of a folder elsewhere: https://... `about` says what the
    file is, `flag` what takes a path, if not --teacher. Raises UserError naming both where there is
    no file; with `offline` or $HF_HUB_OFFLINE no network call is made.
    """
    if path:
        found = Path(path).expanduser()
        found = found / file if found.is_dir() else found
        if not found.is_file():
            raise UserError(f"the network {teacher} is given a file that is not there: {found}.")
        return found
    elsewhere = repo.startswith("https://")
    where, found, fetch = _at_address(repo, file) if elsewhere else _on_hub(teacher, repo, file)
    if found:
        return Path(found)
    why = "None was fetched: offline."
    if not is_offline(offline):
        try:
            return Path(fetch())
        except (
            Exception
        ) as error:  # no network, no such file, terms not agreed to, a full disk: many types
            why = f"They could not be fetched: {type(error).__name__}, {first_line(error)}."
    raise UserError(
        f"the weights of {teacher} are not on this machine: {file} of {where}, {about}. {why} "
        f"Give the file by its path: {flag or f'--teacher {teacher}='}/path/to/{file}"
    )


def _on_hub(teacher, repo, file):
    """Return (name of the place, path in the hub's cache or None, function that downloads it)."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"the network {teacher} is looked up by huggingface_hub: pip install huggingface_hub"
        ) from None
    found = huggingface_hub.try_to_load_from_cache(repo, file)
    return (
        f"huggingface.co/{repo}",
        found if isinstance(found, str) else None,  # what is known to be missing is an object
        lambda: huggingface_hub.hf_hub_download(repo, file),
    )


def _at_address(address, file):
    """Return (name of the place, path in gear's or torch's cache or None, function that downloads
    it).
    """
    own, torchs = cache_dir() / file, Path(torch.hub.get_dir()) / "checkpoints" / file

    def fetch():
        own.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"{address}/{file}", str(own), progress=False)
        return own

    found = next((path for path in (own, torchs) if path.is_file()), None)
    return address.removeprefix("https://"), found, fetch


def file_hash(path):
    """Return the SHA-256 of a file in hex; raises UserError where the hub's cache says another
    one.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve()  # the hub's cache calls a large file by its hash
    if (
        blob.parent.name == "blobs"
        and re.fullmatch("[0-9a-f]{64}", blob.name)
        and blob.name != digest
    ):
        raise UserError(
            f"the cached file {blob} is damaged: its hash is not its name. Delete it, and it is "
            "fetched again."
        )
    return digest


def read_tensors(path):
    """Return {name: tensor} of a .safetensors or a PyTorch file; raises UserError for what holds
    more or cannot be read.
    """
    try:
        content = read_content(path)
    except NotWeights as error:
        raise UserError(f"the weight file {path} cannot be read: it {error}.") from None
    for _ in range(DEPTH):
        if isinstance(content, dict):
            content = next(
                (content[wrapper] for wrapper in WRAPPERS if wrapper in content), content
            )
    several = [tensors for _, tensors in state_dicts(content if isinstance(content, dict) else {})]
    tensors = tensors_of(content) or (several[0] if len(several) == 1 else {})
    if not tensors:
        what = (
            f"{len(several)} sets of tensors: save alone the one that is meant"
            if several
            else "no tensors by name"
        )
        raise UserError(f"the weight file {path} holds {what}.")
    return stripped(tensors)


def named_for(network, tensors, rename=dict):
    """Return `rename(tensors)`, of the names behind a prefix ("model.") if only then they are those
    of `network`.
    """
    expected, plain = network.state_dict().keys(), rename(tensors)
    prefixes = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name))
    for prefix in (
        p
        for p, count in prefixes.items()
        if plain.keys() != expected and count > len(expected) // 2
    ):
        named = rename(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        if named.keys() == expected:
            return named
    return plain
