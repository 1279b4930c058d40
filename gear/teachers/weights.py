"""Published weights: a file given by its path, found in a cache, or downloaded.

No code in a file is run.
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

FILE = "model.safetensors"  # usual name of a weight file in the hub's repositories
DEPTH = 4  # largest number of nested wrappers
# entries in which a file may have its tensors, in order of preference
WRAPPERS = ("state_dict", "model", "teacher", "ema_encoder")


def is_offline(requested=False):
    """Return whether downloads are forbidden: as requested, or by $HF_HUB_OFFLINE."""
    return requested or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def find_weights(teacher, repo, about, path="", offline=False, flag="", file=FILE):
    """Return the path of a network's weight file.

    The file is `path`, or `file` in the folder `path`. If `path` is empty, the file is that of
    `repo`, from a cache or downloaded. `repo` is a repository of the hub, or the address of a
    folder elsewhere: https://... With `offline` or $HF_HUB_OFFLINE no network call is made.

    Raises UserError where there is no such file. The message describes it by `about`, and names the
    option that takes a path: `flag`, by default --teacher.
    """
    if path:
        given_path = Path(path).expanduser()
        weight_file = given_path / file if given_path.is_dir() else given_path
        if not weight_file.is_file():
            raise UserError(
                f"the weight file given for the network {teacher} does not exist: {weight_file}."
            )
        return weight_file
    is_address = repo.startswith("https://")
    location, cached, download = (
        _at_address(repo, file) if is_address else _on_hub(teacher, repo, file)
    )
    if cached:
        return Path(cached)
    reason = "They were not downloaded: offline."
    if not is_offline(offline):
        try:
            return Path(download())
        # many types: no network, no such file, terms that were not accepted, a full disk
        except Exception as error:
            reason = f"They could not be downloaded: {type(error).__name__}, {first_line(error)}."
    raise UserError(
        f"the weights of {teacher} are not on this machine: {file} of {location}, {about}. "
        f"{reason} Give the file by its path: {flag or f'--teacher {teacher}='}/path/to/{file}"
    )


def _on_hub(teacher, repo, file):
    """Return (location in words, path in the hub's cache or None, function that downloads)."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"finding the weights of {teacher} needs huggingface_hub: pip install huggingface_hub"
        ) from None
    cached = huggingface_hub.try_to_load_from_cache(repo, file)
    return (
        f"huggingface.co/{repo}",
        cached if isinstance(cached, str) else None,  # an object marks files known to be missing
        lambda: huggingface_hub.hf_hub_download(repo, file),
    )


def _at_address(address, file):
    """Return (location in words, path in gear's or torch's cache or None, download function)."""
    gear_file = cache_dir() / file
    torch_file = Path(torch.hub.get_dir()) / "checkpoints" / file

    def download():
        gear_file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"{address}/{file}", str(gear_file), progress=False)
        return gear_file

    cached = next((path for path in (gear_file, torch_file) if path.is_file()), None)
    return address.removeprefix("https://"), cached, download


def file_hash(path):
    """Return the SHA-256 of a file in hex.

    Raises UserError for a file of the hub's cache whose name is another hash.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve()  # the hub's cache names a large file by its hash
    if (
        blob.parent.name == "blobs"
        and re.fullmatch("[0-9a-f]{64}", blob.name)
        and blob.name != digest
    ):
        raise UserError(
            f"the cached file {blob} is damaged: its hash is not its name. Delete it; it is then "
            "downloaded again."
        )
    return digest


def read_tensors(path):
    """Return {name: tensor} of a safetensors or PyTorch file with one set of tensors.

    Raises UserError for a file that cannot be read, and for several sets or none.
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
    sets = [tensors for _, tensors in state_dicts(content if isinstance(content, dict) else {})]
    tensors = tensors_of(content) or (sets[0] if len(sets) == 1 else {})
    if not tensors:
        description = (
            f"{len(sets)} sets of tensors: save the one you mean alone"
            if sets
            else "no tensors by name"
        )
        raise UserError(f"the weight file {path} holds {description}.")
    return stripped(tensors)


def named_for(network, tensors, rename=dict):
    """Return `rename(tensors)`, without a prefix of their names ("model.") where there is one.

    A prefix is removed only if the names are those of `network` afterwards, and not before.
    """
    expected = network.state_dict().keys()
    unprefixed = rename(tensors)
    if unprefixed.keys() == expected:
        return unprefixed
    prefixes = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name))
    for prefix, count in prefixes.items():
        if count <= len(expected) // 2:  # too few names for the network
            continue
        inner = rename(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        if inner.keys() == expected:
            return inner
    return unprefixed
