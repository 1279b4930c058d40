"""Names of images within a source, the same for a folder and for any archive of it."""

import posixpath
import re
import unicodedata

from gear.config import UserError

SPLITS = {  # words in names of folders, and what they mean
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
    """Return a path within an archive as a folder's walk would name it: no ".", no "..", composed
    letters.

    Letters come composed (NFC), for a Mac packs them in two parts.
    """
    parts = re.split(f"[{re.escape(separators)}]", path)
    return unicodedata.normalize("NFC", "/".join(p for p in parts if p not in ("", ".", "..")))


def named(entries, source):
    """Return ({name: entry}, top) of {tidy path: entry}: a folder that holds all class folders does
    not count.

    Raises UserError where the folders are splits, which hold the same classes.
    """
    top = ""
    while True:
        rest = [path.removeprefix(top) for path in entries]
        folders = {path.split("/")[0] for path in rest if "/" in path}
        splits = _splits(folders)
        if splits:
            first = min(splits, key=lambda folder: (not folder.lower().startswith("train"), folder))
            inside = posixpath.join(str(source), top, first)
            raise UserError(
                f"'{source}' holds the splits {', '.join(sorted(splits))}, which are no classes: "
                "give "
                f"one of them, as in '{inside}' (an archive: unpacked)."
            )
        if len(folders) != 1 or any(path.count("/") < 2 for path in rest):
            return {path: entries[top + path] for path in sorted(rest)}, top
        top += f"{folders.pop()}/"


def follow(files, links, census, prefix=""):
    """Add to {path: entry} of an archive what its `links` {path: target} lead to, files or folders.

    Those that lead nowhere are counted in the `census`, with the `prefix` before their paths.
    """
    for path, target in links.items():
        for _ in links:  # a link to a link, and no ring of them
            target = links.get(target, target)
        if target in files:
            files[path] = files[target]
            continue
        inside = {
            path + name[len(target) :]: entry
            for name, entry in files.items()
            if name.startswith(f"{target}/")
        }
        if not inside or path.startswith(f"{target}/"):
            census.leave_out(f"{prefix}{path}", "a link to nothing, or no plain file", is_loss=True)
        else:
            files |= inside


def _splits(folders):
    """Return those folders that are splits of one data set: `train` and `val`, `cars_train` and
    `cars_test`.
    """
    alike = {}
    for folder in folders:
        words = re.findall(r"[^\W\d_]+", folder.lower())
        for word in SPLITS.keys() & set(words):
            words.remove(word)
            alike.setdefault(" ".join(words), {})[folder] = SPLITS[word]
    return next((set(group) for group in alike.values() if len(set(group.values())) > 1), set())
