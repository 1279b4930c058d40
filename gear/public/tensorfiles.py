"""Files of tensors that others wrote: their tensors by name, or what such a file is instead. No
code in it is run.

A file is told by its content, not by the ending of its name.
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
ARCHIVES = {  # first bytes of what weights are packed in
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x05\x06": "empty zip",
}
# patterns of the first bytes of files that hold other things, or weights for other libraries
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
# the last bytes of its checkpoints and of their indices
TENSORFLOW = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
PICKLE = rb"\x80[\x02-\x05]|\([dl]p|c[\w.]+\n\w+\n|[\]}]"  # an old file is a bare pickle
ASIDE = re.compile(r"opt(_|im|$)|.*optimi[sz]er|lr_|sched|.*scaler")  # entries of a trainer's own
# what torch puts into a name
WRAPS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".h5")
WEB_PAGE = "text (a web page?), not weights: fetch it again, from the address of the file itself"
ADVICE = "gear reads PyTorch's and safetensors' files"


class NotWeights(UserError):
    """Say of a file, the subject of the sentence, why no tensors can be read from it."""


def is_safetensors(path):
    """Say whether a file begins as safetensors do: the length of a JSON header, and the header."""
    head = _head(path)
    return head[8:9] == b"{" and b"\0" in head[:8]


def read_safetensors(path):
    """Return ({name: tensor}, {key: text of the metadata}) of a safetensors file; raises
    NotWeights.
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
    """Return what a file of PyTorch or safetensors holds, tensors in nested dictionaries as a rule;
    raises NotWeights.
    """
    if is_safetensors(path):
        return read_safetensors(path)[0]
    if what := what_else(path):
        raise NotWeights(f"is not a checkpoint. It is {what}")
    try:
        # LlamaGen's arguments: names and values, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            # torch.load is misled by that suffix, and asks for UTF-8
            if path.suffix == ".safetensors" or not is_utf8(path):
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=_head(path).startswith(ZIP)
            )
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python objects ({held[1]})" if held else "what no checkpoint of tensors holds"
        raise NotWeights(
            f"holds {what}, and nothing of that is run: save its tensors alone"
        ) from None
    except Exception as error:  # torch has no one type for this
        raise NotWeights(
            "is not a checkpoint. It is cut short, or damaged: fetch it again "
            f"({first_line(error)})"
        ) from None


def what_else(path):
    """Say what a file is that is neither PyTorch's nor safetensors', and what to do; "" where it
    may be one of those.
    """
    head = _head(path)
    if not head:
        return "empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights: git lfs pull"
    if head.startswith(ZIP):
        return _what_zip(path)
    packed = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
    if packed or head[257:262] == b"ustar":
        return f"an archive ({packed or 'tar'}): unpack it first"
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(TENSORFLOW)))
        if file.read() == TENSORFLOW or re.search(r"\.data-\d+-of-\d+$", path.name):
            return f"a part of a TensorFlow checkpoint: {ADVICE}"
    if other := next(
        (what for pattern, what in FORMATS if re.match(pattern, head, re.DOTALL)), None
    ):
        return f"{other}: {ADVICE}"
    if re.match(PICKLE, head):
        return ""
    if re.match(rb"\s*<[!?A-Za-z]", head):  # in whatever encoding
        return WEB_PAGE
    is_text = head.startswith((b"\xff\xfe", b"\xfe\xff")) or not re.search(
        rb"[\0-\x08\x0e-\x1a]", head
    )
    return _what_text(path) if is_text else f"of an unknown kind: {ADVICE}"


def _head(path):
    with open(path, "rb") as file:
        return file.read(512)


def _what_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise NotWeights("is cut short: fetch it again") from None
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return (
            "a TorchScript archive, which is code: save the state_dict() of what torch.jit.load "
            "makes of it"
        )
    if "data.pkl" in ends:
        return ""
    if "model.weights.h5" in ends:
        return f"a Keras file: {ADVICE}"
    if packed := [name for name in names if name.endswith(WEIGHTS)]:
        return f"an archive (zip) that holds {packed[0]}: unpack it first"
    if names and all(name.endswith(".npy") for name in names):
        return f"an .npz of NumPy arrays: {ADVICE}"
    return "an archive (zip) without weights: another file"


def _what_text(path):
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
            "join their tensors in one file"
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        begins = " ".join(text[:40].split())
        return f"text, not weights (it begins with '{begins}'): fetch it again"


# -- tensors ---------------------------------------------------------------------------------------


def tensors_of(content):
    """Return the tensors by name in a dictionary; none in anything else."""
    items = content.items() if isinstance(content, dict) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def state_dicts(content):
    """Yield (keys around it, {name: tensor}) of every dictionary of tensors in nested ones, but for
    those of optimizers.
    """
    stack, seen = [((), content)], set()
    while stack:
        keys, entries = stack.pop()
        if tensors := tensors_of(entries):
            yield keys, tensors
        inner = [((*keys, key), value) for key, value in entries.items() if isinstance(value, dict)]
        if id(entries) not in seen:  # a file may hold a dictionary within itself
            stack += [
                item
                for item in reversed(inner)
                if isinstance(item[0][-1], str) and not ASIDE.match(item[0][-1])
            ]
        seen.add(id(entries))


def stripped(tensors):
    """Take away what torch.compile and its parallel wrappers put into names, unless two would then
    be called the same.
    """
    names = [".".join(part for part in name.split(".") if part not in WRAPS) for name in tensors]
    return dict(zip(names, tensors.values())) if len(set(names)) == len(names) else tensors


def first_line(error):
    """Return the first line of what an exception says, 200 characters at most."""
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    return textwrap.shorten(line, 200, placeholder=" ...").rstrip(".")
