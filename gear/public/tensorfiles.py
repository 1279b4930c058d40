"""Reading tensor files of PyTorch and safetensors, and saying what any other file is.

A file is recognised by its content, not by its suffix. No code in a file is run.
"""

import argparse
import json
import pickle
import re
import textwrap
import zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load

from gear.config import UserError
from gear.files import is_utf8, read_text

ZIP = b"PK\x03\x04"
ARCHIVES = {  # first bytes of the archives in which weights are distributed
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x05\x06": "empty zip",
}
# patterns of the first bytes of other files, or of weights for other libraries
FORMATS = (
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras writes"),
    (rb"(GGUF|ggml|lmgg|tjgg)", "a GGUF file of quantised weights"),
    (rb".{4}TFL3", "a TensorFlow Lite file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x08\x01\x12", "a TensorFlow SavedModel"),
    (rb"\x08[\x02-\x20][\x12\x1a\x22\x3a\x42]", "an ONNX file"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|BM.{8}\x36|II\*\0|MM\0\*", "an image"),
    (rb"PAR1", "a Parquet table"),
    (rb"SQLite format 3", "a SQLite database"),
    (rb"%PDF", "a PDF document"),
)
# last bytes of a TensorFlow checkpoint, and of its index
TENSORFLOW = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
PICKLE = rb"\x80[\x02-\x05]|\([dl]p|c[\w.]+\n\w+\n|[\]}]"  # PyTorch's old format is a bare pickle
# entries with the state of a trainer, not with a network
ASIDE = re.compile(r"opt(_|im|$)|.*optimi[sz]er|lr_|sched|.*scaler")
# parts of a tensor's name that torch.compile and parallel wrappers add
WRAPS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".h5")
WEB_PAGE = "text (a web page?), not weights: fetch it again, from the address of the file itself"
ADVICE = "gear reads PyTorch's and safetensors' files"


class NotWeights(UserError):
    """Raised where no tensors can be read from a file.

    The message is a predicate, without the subject: the caller puts the name of the file before it.
    """


def is_safetensors(path):
    """Return whether a file begins as a safetensors file: the length of a JSON header, then `{`."""
    head = _head(path)
    return head[8:9] == b"{" and b"\0" in head[:8]


def read_safetensors(path):
    """Return ({name: tensor}, {key: text} of the metadata) of a safetensors file.

    Raises NotWeights for a damaged file.
    """
    try:
        if not is_utf8(path):
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return load(content), header.get("__metadata__", {})
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors raises its own Rust exception type
        raise NotWeights(
            f"is cut short, or damaged: fetch it again ({first_line(error)})"
        ) from None


def read_content(path):
    """Return the content of a PyTorch or safetensors file, usually nested dictionaries of tensors.

    Raises NotWeights for any other file, and for one with Python objects.
    """
    if is_safetensors(path):
        return read_safetensors(path)[0]
    if description := what_else(path):
        raise NotWeights(f"is not a checkpoint. It is {description}")
    try:
        # LlamaGen's files hold its arguments as a Namespace, which is names and values, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            # torch.load takes this suffix for a safetensors file, and needs a path in UTF-8
            if path.suffix == ".safetensors" or not is_utf8(path):
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=_head(path).startswith(ZIP)
            )
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        objects = f"Python objects ({match[1]})" if match else "data that is not tensors"
        raise NotWeights(
            f"holds {objects}, which gear does not load: save the tensors alone"
        ) from None
    except Exception as error:  # torch raises errors of many types for a damaged file
        raise NotWeights(
            "is not a checkpoint. It is cut short, or damaged: fetch it again "
            f"({first_line(error)})"
        ) from None


def what_else(path):
    """Describe a file that is no PyTorch or safetensors file, with advice.

    Returns "" for a file that may be one of the two.
    """
    head = _head(path)
    if not head:
        return "empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights: git lfs pull"
    if head.startswith(ZIP):
        return _what_zip(path)
    archive = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
    if archive or head[257:262] == b"ustar":
        return f"an archive ({archive or 'tar'}): unpack it first"
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(TENSORFLOW)))
        if file.read() == TENSORFLOW or re.search(r"\.data-\d+-of-\d+$", path.name):
            return f"a part of a TensorFlow checkpoint: {ADVICE}"
    if description := next(
        (name for pattern, name in FORMATS if re.match(pattern, head, re.DOTALL)), None
    ):
        return f"{description}: {ADVICE}"
    if re.match(PICKLE, head):
        return ""
    if re.match(rb"\s*<[!?A-Za-z]", head):  # its encoding need not be UTF-8
        return WEB_PAGE
    is_text = head.startswith((b"\xff\xfe", b"\xfe\xff")) or not re.search(
        rb"[\0-\x08\x0e-\x1a]", head
    )
    return _what_text(path) if is_text else f"of an unknown kind: {ADVICE}"


def _head(path):
    """Return the first 512 bytes of a file."""
    with open(path, "rb") as file:
        return file.read(512)


def _what_zip(path):
    """Describe a zip that is no PyTorch file; returns "" for one that may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise NotWeights("is cut short: fetch it again") from None
    file_names = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in file_names:
        return (
            "a TorchScript archive, which is code: load it with torch.jit.load, and save the "
            "state_dict() of the result"
        )
    if "data.pkl" in file_names:
        return ""
    if "model.weights.h5" in file_names:
        return f"a Keras file: {ADVICE}"
    if weight_files := [name for name in names if name.endswith(WEIGHTS)]:
        return f"an archive (zip) that holds {weight_files[0]}: unpack it first"
    if names and all(name.endswith(".npy") for name in names):
        return f"an .npz of NumPy arrays: {ADVICE}"
    return "an archive (zip) without weights: give a file of weights"


def _what_text(path):
    """Describe a text file."""
    try:
        text = read_text(path) if path.stat().st_size < 1 << 26 else "..."
    except UserError:
        return f"of an unknown kind: {ADVICE}"
    if text.lstrip().startswith("<"):
        return WEB_PAGE
    try:
        shards = sorted(set(dict(json.loads(text))["weight_map"].values()))
        return (
            f"the index of a checkpoint in {len(shards)} parts ({', '.join(shards[:3])}, ...): "
            "save the tensors of all parts in one file"
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        beginning = " ".join(text[:40].split())
        return f"text, not weights (it begins with '{beginning}'): fetch it again"


# -- tensors ---------------------------------------------------------------------------------------


def tensors_of(content):
    """Return {name: tensor} of the tensors in a dictionary; {} for anything else."""
    items = content.items() if isinstance(content, dict) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def state_dicts(content):
    """Yield (keys, {name: tensor}) of every dictionary of tensors within nested dictionaries.

    `keys` are those that lead to the dictionary. Dictionaries of optimizers, schedulers and scalers
    are left out.
    """
    stack = [((), content)]
    visited = set()
    while stack:
        keys, entries = stack.pop()
        if tensors := tensors_of(entries):
            yield keys, tensors
        inner = [((*keys, key), value) for key, value in entries.items() if isinstance(value, dict)]
        if id(entries) not in visited:  # a dictionary may contain itself
            stack += [
                item
                for item in reversed(inner)
                if isinstance(item[0][-1], str) and not ASIDE.match(item[0][-1])
            ]
        visited.add(id(entries))


def stripped(tensors):
    """Remove from names the parts that torch.compile and parallel wrappers add.

    Returns the tensors unchanged if two would then have the same name.
    """
    names = [".".join(part for part in name.split(".") if part not in WRAPS) for name in tensors]
    return dict(zip(names, tensors.values())) if len(set(names)) == len(names) else tensors


def first_line(error):
    """Return the first line of an exception's message, at most 200 characters."""
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    return textwrap.shorten(line, 200, placeholder=" ...").rstrip(".")
