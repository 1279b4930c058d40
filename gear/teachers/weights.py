"""Weights that others published: a file by its path, else from the hub's cache, else downloaded; no code in it is run."""

import hashlib
import os
import re
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file

from gear.config import UserError

FILE = "model.safetensors"  # as the hub's repositories call it
WRAPPERS = ("state_dict", "model", "teacher")  # entries under which a file may keep its tensors


def is_offline(asked=False):
    """Tell whether no network call may be made: asked for, or $HF_HUB_OFFLINE is set."""
    return asked or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def find_weights(teacher, repo, about, path="", offline=False, flag="", file=FILE):
    """Return a file of a network: `path` (or `file` in that folder), else of `repo` in the hub's cache, else downloaded.

    `about` says what the file is, `flag` what takes a path, if not --teacher. Raises UserError naming both where there is no
    file; with `offline` or $HF_HUB_OFFLINE no network call is made.
    """
    if path:
        found = Path(path).expanduser()
        found = found / file if found.is_dir() else found
        if not found.is_file():
            raise UserError(f"the network {teacher} is given a file that is not there: {found}.")
        return found
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"the network {teacher} is looked up by huggingface_hub: pip install huggingface_hub") from None
    if isinstance(found := huggingface_hub.try_to_load_from_cache(repo, file), str):
        return Path(found)
    why = "None was fetched: offline."
    if not is_offline(offline):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        except Exception as error:  # no network, no such file, terms not agreed to, a full disk: many types
            why = f"They could not be fetched: {type(error).__name__}, {_first_line(error)}."
    raise UserError(
        f"the weights of {teacher} are not on this machine: {file} of huggingface.co/{repo}, {about}. {why} "
        f"Give the file by its path: {flag or f'--teacher {teacher}='}/path/to/{file}"
    )


def file_hash(path):
    """Return the SHA-256 of a file in hex; raises UserError where the hub's cache says another one."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve()  # the hub's cache calls a large file by its hash
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise UserError(f"the cached file {blob} is damaged: its hash is not its name. Delete it, and it is fetched again.")
    return digest


def read_tensors(path):
    """Return {name: tensor} of a .safetensors or a PyTorch file; raises UserError for what holds more or cannot be read."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # neither library has one type for this
        raise UserError(
            f"the weight file {path} cannot be read ({_first_line(error)}): it is cut short, or holds more than tensors."
        ) from None
    while isinstance(content, dict) and (inner := next((content[w] for w in WRAPPERS if w in content), None)) is not None:
        content = inner
    tensors = {n: t for n, t in content.items() if isinstance(t, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"the weight file {path} holds no tensors by name.")
    return tensors


def _first_line(error):
    return textwrap.shorten((str(error).strip().splitlines() or ["no reason given"])[0], 200, placeholder=" ...").rstrip(".")
