"""Tar shards, read without unpacking them.

Python's `tarfile` lists the position of every file in a shard once, and the list is kept in the
cache folder. Any sample can then be read directly. Sample n of the stream therefore stays a
function of (seed, n), and a run resumes at any sample without reading earlier ones.

An image and its companion files share their name up to the extension: KEY.png, KEY.cls, KEY.json.
They need not be adjacent. The extension may also begin at the first dot: KEY.seg.png is a companion
of KEY.png, but an image of its own if there is no KEY.png.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import posixpath
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gear.config import UserError
from gear.data.census import Census
from gear.data.names import follow, named, tidy
from gear.data.pixels import is_hidden
from gear.files import cache_dir, say_once, write_atomically

GROUP = 16  # number of shards that are read, and whose samples are mixed, at a time
MOST_CLASSES = 1_000_000
BLOCK = 512  # size in bytes of the blocks of a tar


class Shards:
    """The images of tar shards.

    The label of an image is the content of KEY.cls, or "label" in KEY.json. Labelled images are
    named LABEL/SHARD/KEY. Others are named by their paths, as in a zip; if there are several
    shards, the file name is SHARD:KEY. Raises UserError if a shard is missing or cut short, or if
    only some of the images have a label.
    """

    def __init__(self, source):
        self.paths = _paths(source)
        self.census = Census()
        self.folders = []
        self.top = ""
        self._descriptors = functools.lru_cache(2 * GROUP)(_Descriptor)
        bar = tqdm(self.paths, "reading shards", delay=2, leave=False)
        listings = [_Listing(path, self.census) for path in bar]
        self.numbered = any(
            label is not None for listing in listings for label in listing.labels.values()
        )
        if self.numbered:
            groups = [listing.by_label() for listing in listings]
        else:
            groups = [listing.by_path(len(listings) > 1) for listing in listings]
        entries = {  # name -> (number of the shard, offset, length)
            name: (i, *extent) for i, group in enumerate(groups) for name, extent in group.items()
        }
        if not self.numbered:
            entries, self.top = named(entries, source)
        if not self.numbered and len(listings) > 1 and not any("/" in name for name in entries):
            say_once(
                f"{source}: {len(listings)} shards with neither labels nor class folders are one "
                "class"
            )
        self.entries = entries
        self.names = list(entries)

    def open(self, name):
        number, offset, length = self.entries[name]
        return io.BytesIO(self._descriptors(self.paths[number], os.getpid()).read(offset, length))

    def length(self, name):
        return self.entries[name][2]

    def stamp(self, name):
        return _stamp(self.paths[self.entries[name][0]])

    def order(self, names, rng):
        """Return the positions of `names` in the random order of one epoch.

        Shards are visited in random groups of GROUP; the samples of a group are mixed.
        """
        shards = np.array([self.entries[name][0] for name in names])
        group = rng.permutation(len(self.paths))[shards] // GROUP
        return np.lexsort((rng.random(len(names)), group))


class _Descriptor:
    """An open shard. Reads pass their offset, so that processes can share the descriptor."""

    def __init__(self, path, process):
        self.file = open(path, "rb")

    def read(self, offset, length):
        return os.pread(self.file.fileno(), length, offset)


class _Listing:
    """The images of one shard, {tidy path: (offset, length)}, and their labels, {tidy path: number
    or None}.
    """

    def __init__(self, path, census):
        self.path = path
        self.images = {}
        files = _files(path, census)
        companions = {  # the same files with their extensions in lower case
            _stem(name) + posixpath.splitext(name)[1].lower(): extent
            for name, extent in files.items()
        }
        read = _Descriptor(path, os.getpid()).read

        def is_image(name):
            return census.takes(name, lambda: io.BytesIO(read(*files[name])))

        images = [
            name
            for name in files
            if not name.lower().endswith((".cls", ".json")) and is_image(name)
        ]
        stems = {_stem(name) for name in images}
        for name in images:
            if _stem(name) != _key(name) and _key(name) in stems:
                census.leave_out(f"{path.name}/{name}", "it goes with an image")
            else:
                self.images[name] = files[name]
        self.labels = {name: self._label(name, companions, read) for name in self.images}
        labelled = {stem for name in self.images for stem in (_stem(name), _key(name))}
        for name in files:
            if name.lower().endswith(".cls") and _stem(name) not in labelled:
                census.leave_out(f"{path.name}/{name}", "a label without its image", is_loss=True)

    def _label(self, name, files, read):
        """Return the label of an image, or None. Raises UserError if it is no class number."""
        for stem in dict.fromkeys((_stem(name), _key(name))):
            try:
                if f"{stem}.cls" in files:
                    return int(read(*files[f"{stem}.cls"]).decode("utf-8-sig"))
                if f"{stem}.json" in files:
                    label = json.loads(read(*files[f"{stem}.json"])).get("label")
                    if label is not None:
                        return _class_number(label)
            except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path}: the label of sample '{stem}' is no number ({error})."
                ) from None
        return None

    def by_label(self):
        """Return {LABEL/SHARD/KEY: (offset, length)} of the images.

        Raises UserError for an image without a label.
        """
        extents = {}
        for path, label in self.labels.items():
            if label is None:
                raise UserError(
                    f"{self.path}: sample '{_stem(path)}' has no label, others have. Add "
                    f"{_stem(path)}.cls with the number of its class."
                )
            if not 0 <= label < MOST_CLASSES:
                raise UserError(
                    f"{self.path}: the label of sample '{_stem(path)}' is {label}: a number from 0 "
                    f"to {MOST_CLASSES - 1:,} is expected."
                )
            shard = f"{label:05d}/{self.path.name}"
            # the extension is kept where two images differ in it alone, as 0.png and 0.jpg
            key = _stem(path) if f"{shard}/{_stem(path)}" not in extents else path
            extents[f"{shard}/{key}"] = self.images[path]
        return extents

    def by_path(self, several):
        """Return {name: (offset, length)} of images without labels.

        A name is the path, with the shard's name in it if there are `several` shards.
        """
        if not several:
            return self.images
        extents = {}
        for path, extent in self.images.items():
            folder, _, file = path.rpartition("/")
            short_name, full_name = (
                posixpath.join(folder, f"{self.path.name}:{part}") for part in (_stem(file), file)
            )
            extents[short_name if short_name not in extents else full_name] = extent
        return extents


def _class_number(label):
    """Return a label from JSON as an int; raises ValueError for others, such as true and 3.5."""
    number = int(label)
    if isinstance(label, bool) or number != float(label):
        raise ValueError(f"{label!r}")
    return number


def _stem(name):
    """Return a name without its extension."""
    return posixpath.splitext(name)[0]


def _key(name):
    """Return a name up to the first dot of its last part, which is WebDataset's key."""
    folder, _, file = name.rpartition("/")
    return posixpath.join(folder, file.partition(".")[0])


def _paths(source):
    root = Path(source).expanduser()
    if root.is_dir():
        return sorted(root.glob("*.tar"))
    paths = [root]
    if "{" in str(source) and not root.is_file():
        import braceexpand  # an optional package, needed for lists of shards alone

        with contextlib.suppress(braceexpand.UnbalancedBracesError):
            paths = [Path(path).expanduser() for path in braceexpand.braceexpand(str(source))]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards of '{source}' are not there "
            f"({', '.join(missing[:3])}): a folder of .tar files or a list of them is expected, as "
            "in 'shards/{000000..000009}.tar'."
        )
    if len({path.name for path in paths}) < len(paths):
        raise UserError(
            f"shards of '{source}' share a file name, by which samples are told apart: rename one."
        )
    return paths


def _stamp(path):
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _files(path, census):
    """Return the files of a shard, {tidy path: (offset, length)}.

    A link stands for its target. Of several files with one path the last counts.
    """
    files = {}
    links = {}
    for name, *location in _members(path, *_stamp(path)):
        name = tidy(name)
        if is_hidden(name):
            census.leave_out(f"{path.name}/{name}", "hidden by a system")
            continue
        if name in files or name in links:
            census.leave_out(f"{path.name}/{name}", "an earlier copy of what stands there twice")
            links.pop(name, None)
        if len(location) == 2:  # offset and length of a file
            files[name] = tuple(location)
        else:  # target of a link
            files.pop(name, None)
            links[name] = tidy(location[0])
    follow(files, links, census, f"{path.name}/")
    return files


@functools.lru_cache(None)
def _members(path, size, mtime):
    """List a shard's files, (name, offset, length), and links, (name, target).

    The list is kept in the cache folder.
    """
    key = hashlib.sha256(f"{os.fsencode(path.resolve())} {size} {mtime}".encode()).hexdigest()[:24]
    cached = cache_dir() / "shards" / f"{key}.json"
    try:
        digest, _, text = cached.read_text().partition("\n")
        if digest == hashlib.sha256(text.encode()).hexdigest():
            return json.loads(text)
    except (OSError, ValueError):  # the list is absent or damaged
        pass
    members = _read_members(path, size)
    text = json.dumps(members)
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(cached, lambda p: p.write_text(f"{digest}\n{text}"))
    except OSError:
        pass  # the shard is then read again next time
    return members


def _read_members(path, size):
    """Read the headers of a tar, or of several concatenated ones, as `cat a.tar b.tar` makes."""
    members = []
    start = 0
    with open(path, "rb") as file:
        file.seek(-min(2 * BLOCK, size), os.SEEK_END)
        end = file.read()
        if len(end) < 2 * BLOCK or any(end):  # a tar ends with two blocks of zeros
            raise UserError(
                f"the shard {path} is cut short, or is no plain tar: it has no end mark. Copy or "
                "write it again."
            )
        while start < size:
            file.seek(start)
            try:
                archive = tarfile.open(fileobj=file, mode="r:")
                members += filter(None, map(_member, archive.getmembers()))
            except Exception as error:  # damaged headers raise errors of any type
                raise _unreadable(path, error) from None
            start = _next_archive(file, archive.offset)
            if start == archive.offset:  # tarfile stops silently at a block that is no header
                raise _unreadable(path, f"no header at byte {start}")
    if any(
        offset < 0 or length < 0 or offset + length > size
        for _, offset, length in filter(_is_file, members)
    ):
        raise _unreadable(path, "a file in it is longer than the shard")
    return members


def _unreadable(path, reason):
    return UserError(f"the shard {path} cannot be read ({reason}). Copy or write it again.")


def _is_file(member):
    return len(member) == 3


def _member(info):
    """Return (name, offset, length) for a file, (name, target) for a link, None for a folder."""
    if info.isdir():
        return None
    if info.isreg() and not info.issparse():
        return info.name, info.offset_data, info.size
    if info.issym():
        return info.name, posixpath.normpath(
            posixpath.join(posixpath.dirname(info.name), info.linkname)
        )
    return info.name, info.linkname  # a hard link; the target of other kinds is ""


def _next_archive(file, start):
    """Return the offset of the first block after `start` that is not zero: the next archive."""
    file.seek(start)
    while block := file.read(1 << 16):
        if content := block.lstrip(b"\0"):
            return start + (len(block) - len(content)) // BLOCK * BLOCK
        start += len(block)
    return start
