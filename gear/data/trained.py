"""What a run was trained on, where that lies today, and whether it is still the same: one door for
all who ask.

runs/NAME/data.json     where the images lie, their classes, and by what the images are told from
                        others
"""

import hashlib
import json
import os
import sys
from dataclasses import replace

from gear.config import UserError, from_dict
from gear.data.stores import DOWNLOADS
from gear.data.stream import DataConfig, Source, absolute, check_classes
from gear.files import say_once, write_atomically

FACTS = {"source": str, "labels": str, "classes": list, "images": int, "identity": str}


def trained_on(run, source="", labels=""):
    """Return the DataConfig of a run's images, its source being where they lie today: that of
    `open_trained`.
    """
    return open_trained(run, source, labels).config


def open_trained(run, source="", labels=""):
    """Return the Source of a run's images, where they lie today.

    `source` and `labels` say where they, and a file of labels, have moved to; that is remembered.
    Raises UserError where there are no images, where their classes are not those that the run was
    trained on, and where a new place holds other images.
    """
    config = from_dict(DataConfig, run.config["data"])
    if config.source == "scenes" or config.source in DOWNLOADS:
        if source not in ("", config.source):
            raise UserError(
                f"run '{run.name}' was trained on '{config.source}', which does not move to "
                f"'{source}'."
            )
        return Source(config)
    before = _facts(run)
    place = absolute(DataConfig(source)).source if source else place_of(run)
    labels = (
        absolute(DataConfig(labels=labels)).labels
        if labels
        else before.get("labels", config.labels)
    )
    config = replace(absolute(config), source=place, labels=labels)
    if not (source or os.path.exists(place) or any(c in place for c in "{,")):
        raise UserError(
            f"the images of run '{run.name}' are not at '{place}' any more. Where have they moved? "
            f"gear data NEW --moved {run.name}"
        )
    if config.val_source and not os.path.exists(config.val_source):
        raise UserError(
            f"the validation images of run '{run.name}' are not at '{config.val_source}' any more: "
            "put them, or a link to them, back there."
        )
    opened = Source(config)
    images = opened.split("all")
    check_classes(
        config, images.classes, before.get("classes", run.config["generator"]["num_classes"])
    )
    if before:
        _compare(run, before, images, place)
    if source and (place, labels) != (before.get("source"), before.get("labels")):
        note(run, opened)
    return opened


def place_of(run):
    """Return where a run's images lie as far as is known, without a look at them: an absolute path
    or a data set's name.
    """
    began = absolute(DataConfig(run.config["data"]["source"])).source
    last = _facts(run).get("source", began)
    # they may have moved back
    return began if os.path.exists(began) and not os.path.exists(last) else last


def note(run, source):
    """Write down the Source that a run is trained on; for images that are nobody's, as scenes,
    there is nothing to write.
    """
    config = source.config
    if config.source == "scenes" or config.source in DOWNLOADS or not run.path.exists():
        return
    images = source.split("all")
    facts = {
        "source": config.source,
        "labels": config.labels,
        "classes": images.classes,
        "images": len(images),
        "identity": _identity(images),
    }
    text = json.dumps(facts, indent=1) + "\n"
    try:
        write_atomically(run.path / "data.json", lambda path: path.write_text(text))
    except OSError as error:
        print(f"{run.path / 'data.json'} cannot be written ({error.strerror}).", file=sys.stderr)


def _facts(run):
    """Return what `note` wrote, {} for a run from before it did."""
    path = run.path / "data.json"
    try:
        facts = json.loads(path.read_text())
        if {key: type(facts.get(key)) for key in FACTS} != FACTS:
            raise ValueError(f"it does not say {', '.join(FACTS)}")
        return facts
    except FileNotFoundError:
        return {}
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Restore it, or remove it: then nothing is compared."
        ) from None


def _compare(run, before, images, place):
    """Raise UserError where a new place holds other images; say it where the old one has
    changed.
    """
    is_same = before["identity"] == _identity(images)
    numbers = f"{len(images)} images, {before['images']} when the run was trained"
    if place == before["source"]:
        if not is_same:
            say_once(f"'{place}' has changed since run '{run.name}' was trained: {numbers}.")
    elif not is_same:
        raise UserError(
            f"run '{run.name}' was trained on '{before['source']}', and '{place}' holds other "
            f"images ({numbers}; their "
            f"names and sizes are compared). For other images train another run (--label, --name)."
        )


def _identity(images):
    """Return a hash of the images' names and sizes in bytes, which a copy keeps."""
    sizes = (os.fsencode(name) + b" %d" % images.store.length(name) for name in images.names)
    return hashlib.sha256(b"\0".join(sizes)).hexdigest()
