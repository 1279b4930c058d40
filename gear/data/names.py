"""The names of images within a source; they are the same for a folder and any archive of it."""

import posixpath
import re
import unicodedata

from gear.config import UserError

SPLITS = {  # words in the names of folders, and the splits that they stand for
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "unlabeled": "unlabelled",
    "unlabelled": "unlabelled",
}


def tidy(path, separators="/"):
    """Normalise a path within an archive to the name that a folder's walk gives: no "." or "..".

    Letters are composed (NFC), because a Mac stores accents separately.
    """
    parts = re.split(f"[{re.escape(separators)}]", path)
    return unicodedata.normalize("NFC", "/".join(p for p in parts if p not in ("", ".", "..")))


def named(entries, source):
    """Return ({name: entry}, top) of {tidy path: entry}.

    A name is the path without `top`, the folders around all class folders ("" or "a/b/"). Raises
    UserError if the folders are splits of one data set, which are not classes.
    """
    top = ""
    while True:
        names = [path.removeprefix(top) for path in entries]
        folders = {name.split("/")[0] for name in names if "/" in name}
        splits = _splits(folders)
        if splits:
            first = min(splits, key=lambda folder: (not folder.lower().startswith("train"), folder))
            example = posixpath.join(str(source), top, first)
            raise UserError(
                f"'{source}' holds the splits {', '.join(sorted(splits))}, which are no classes: "
                f"give one of them, as in '{example}' (unpack an archive first)."
            )
        if len(folders) != 1 or any(name.count("/") < 2 for name in names):
            return {name: entries[top + name] for name in sorted(names)}, top
        top += f"{folders.pop()}/"


def follow(files, links, census, prefix=""):
    """Resolve the links of an archive: add an entry to `files` for every file that they lead to.

    files: {path: entry}. links: {path: target}; a target is a file or a folder. Links that lead
    nowhere are counted in the `census`, with `prefix` before their paths.
    """
    for path, target in links.items():
        for _ in links:  # follows links to links; the number of steps is bounded, for cycles
            target = links.get(target, target)
        if target in files:
            files[path] = files[target]
            continue
        files_inside = {
            path + name[len(target) :]: entry
            for name, entry in files.items()
            if name.startswith(f"{target}/")
        }
        if not files_inside or path.startswith(f"{target}/"):
            census.leave_out(f"{prefix}{path}", "a link to nothing, or no plain file", is_loss=True)
        else:
            files |= files_inside


def _splits(folders):
    """Return the folders that are splits of one data set, such as `train` and `val` or `cars_train`
    and `cars_test`; an empty set if there are none.
    """
    groups = {}  # the folder's other words -> {folder: split}
    for folder in folders:
        words = re.findall(r"[^\W\d_]+", folder.lower())
        for word in SPLITS.keys() & set(words):
            words.remove(word)
            groups.setdefault(" ".join(words), {})[folder] = SPLITS[word]
    return next((set(group) for group in groups.values() if len(set(group.values())) > 1), set())
