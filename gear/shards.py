"""WebDataset shards: plain tar files of samples, each an image and, under the same key, its label; read in place by `wids`.

`wids`, webdataset's indexed reader, gives any sample of a shard by its number, so that sample n of the stream stays a function
of (seed, n) and a run resumes at any sample without reading what went before.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from gear.config import UserError
from gear.home import cache_dir, write_atomically

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
GROUP = 16  # shards that are read at a time: an epoch mixes samples among so many


def is_spec(source):
    """Tell shards by their name, a.tar or {0..9}.tar; a folder, by tar files in it and no image."""
    return str(source).endswith(".tar") or any(Path(source).expanduser().glob("*.tar"))


class Shards:
    """The samples of shards, named LABEL/SHARD/KEY, or SHARD:KEY where none has a label: KEY.cls, or "label" in KEY.json.

    Raises UserError where `wids` is not installed, a shard is missing or cut short, or only some samples have a label.
    """

    def __init__(self, source):
        self.paths = _paths(source)
        self._open = functools.lru_cache(2 * GROUP)(_open)  # a shard holds two descriptors
        listed = [_listed(path, *_stamp(path)) for path in tqdm(self.paths, "reading shards", delay=2, leave=False)]
        labelled = any(label is not None for samples in listed for _, label in samples)
        self._places = {}
        for number, (path, samples) in enumerate(zip(self.paths, listed)):
            for index, (key, label) in enumerate(samples):
                if labelled and label is None:
                    raise UserError(
                        f"{path}: sample '{key}' has no label, others have. Add {key}.cls, the number of its class."
                    )
                name = f"{label:05d}/{path.name}/{key}" if labelled else f"{path.name}:{key}".replace("/", ":")
                self._places[name] = number, index
        self.names = list(self._places)

    def image(self, name):
        return self._image(name).convert("RGB")

    def size(self, name):
        return self._image(name).size

    def _image(self, name):
        number, index = self._places[name]
        sample = self._open(self.paths[number])[index]
        return Image.open(next(file for ext, file in sample.items() if ext.lower() in EXTENSIONS))

    def stamp(self, name):
        return _stamp(self.paths[self._places[name][0]])

    def order(self, names, rng):
        """Return an epoch's order of `names`: shards in a random order, samples mixed among GROUP of them at a time."""
        shards = np.array([self._places[name][0] for name in names])
        turn = rng.permutation(len(self.paths))[shards] // GROUP
        return np.lexsort((rng.random(len(names)), turn))


def _paths(source):
    try:
        import braceexpand
    except ImportError:
        raise _missing("braceexpand") from None
    root = Path(source).expanduser()
    paths = (
        sorted(root.glob("*.tar")) if root.is_dir() else [Path(p).expanduser() for p in braceexpand.braceexpand(str(source))]
    )
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards of '{source}' are not there ({', '.join(missing[:3])}): give --source a "
            f"folder of .tar files or a list of them, as in 'shards/{{000000..000009}}.tar'."
        )
    if len({path.name for path in paths}) < len(paths):
        raise UserError(f"shards of '{source}' share a file name, by which samples are told apart: rename one.")
    return paths


def _missing(module):
    return UserError(f"tar shards need {module}: pip install 'webdataset<1' (later ones come without it).")


def _stamp(path):
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _open(path):
    """Open a shard: a sequence of {".jpg": file, "__key__": key}."""
    try:
        import wids.wids
    except ImportError:
        raise _missing("wids") from None
    with open(path, "rb") as file:
        file.seek(-min(1024, path.stat().st_size), 2)
        end = file.read()
    if len(end) < 1024 or any(end):  # a tar ends with two blocks of zeros
        raise UserError(f"the shard {path} is cut short, or is no plain tar: it has no end mark. Copy or write it again.")
    try:
        return wids.wids.IndexedTarSamples(path=path)
    except Exception as error:  # it parses headers with struct, int and decode
        raise UserError(f"the shard {path} cannot be read ({error}). Copy or write it again.") from None


@functools.lru_cache(None)
def _listed(path, size, mtime):
    """List (key, label or None) of a shard's samples; read once, then kept in the cache folder."""
    key = hashlib.sha256(f"{path.resolve()} {size} {mtime}".encode()).hexdigest()[:24]
    kept = cache_dir() / "shards" / f"{key}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):  # not there yet
        listed = [_key_and_label(path, sample) for sample in _open(path)]
    try:
        write_atomically(kept, lambda p: p.write_text(json.dumps(listed)))
    except OSError:
        pass  # then it is read again next time
    return listed


def _key_and_label(path, sample):
    key = sample["__key__"]
    if not any(extension.lower() in EXTENSIONS for extension in sample):
        raise UserError(f"{path}: sample '{key}' has no image ({', '.join(sorted(EXTENSIONS))}).")
    try:
        label = json.load(sample[".json"]).get("label") if ".json" in sample else None
        label = sample[".cls"].read() if ".cls" in sample else label
        label = None if label is None else int(label)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the label of sample '{key}' is no number ({error}).") from None
    return key, label
