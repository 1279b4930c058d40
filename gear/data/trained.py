"""The images that a run was trained on: where they are today, and whether they are unchanged.

runs/NAME/data.json     the location of the images, their classes, and a hash that identifies them
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

FACTS = {  # fields of data.json and their types
    "source": str,
    "labels": str,
    "classes": list,
    "images": int,
    "identity": str,
}


def trained_on(run, source="", labels=""):
    """Return the DataConfig of a run's images with their location of today; see `open_trained`."""
    return open_trained(run, source, labels).config


def open_trained(run, source="", labels=""):
    """Return the Source of the images that a run was trained on, at their location of today.

    source, labels: the new locations of the images and of the file of labels, if they have moved;
    both are written to the run. Raises UserError if there are no images, if their classes are not
    those of the run, or if a new location holds other images.
    """
    config = from_dict(DataConfig, run.config["data"])
    if config.source == "scenes" or config.source in DOWNLOADS:
        if source not in ("", config.source):
            raise UserError(
                f"run '{run.name}' was trained on '{config.source}', which does not move to "
                f"'{source}'."
            )
        return Source(config)
    facts = _facts(run)
    location = absolute(DataConfig(source)).source if source else place_of(run)
    labels = (
        absolute(DataConfig(labels=labels)).labels if labels else facts.get("labels", config.labels)
    )
    config = replace(absolute(config), source=location, labels=labels)
    if not (source or os.path.exists(location) or any(c in location for c in "{,")):
        raise UserError(
            f"the images of run '{run.name}' are not at '{location}' any more. Say where they are "
            f"now: gear data NEW --moved {run.name}"
        )
    if config.val_source and not os.path.exists(config.val_source):
        raise UserError(
            f"the validation images of run '{run.name}' are not at '{config.val_source}' any more: "
            "put them, or a link to them, back there."
        )
    opened = Source(config)
    images = opened.split("all")
    check_classes(
        config, images.classes, facts.get("classes", run.config["generator"]["num_classes"])
    )
    if facts:
        _compare(run, facts, images, location)
    if source and (location, labels) != (facts.get("source"), facts.get("labels")):
        note(run, opened)
    return opened


def place_of(run):
    """Return the last known location of a run's images: an absolute path, or a data set's name.

    The images themselves are not read.
    """
    first = absolute(DataConfig(run.config["data"]["source"])).source
    last = _facts(run).get("source", first)
    # the images may have moved back to their first location
    return first if os.path.exists(first) and not os.path.exists(last) else last


def note(run, source):
    """Write the location and identity of the Source that a run is trained on to data.json.

    Nothing is written for scenes and downloads, which never move.
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
    """Return the content of data.json, or {} for a run of an older version, which lacks it."""
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
            f"{path} cannot be read ({error}). Restore it, or remove it: the images are then not "
            "compared with those of the training."
        ) from None


def _compare(run, facts, images, location):
    """Raise UserError if a new location holds other images; print a line if the old one has
    changed.
    """
    is_same = facts["identity"] == _identity(images)
    numbers = f"{len(images)} images, {facts['images']} when the run was trained"
    if location == facts["source"]:
        if not is_same:
            say_once(f"'{location}' has changed since run '{run.name}' was trained: {numbers}.")
    elif not is_same:
        raise UserError(
            f"run '{run.name}' was trained on '{facts['source']}', and '{location}' holds other "
            f"images ({numbers}; their names and sizes are compared). For other images train "
            "another run (--label, --name)."
        )


def _identity(images):
    """Return a hash of the images' names and sizes in bytes, which a copy keeps."""
    sizes = (os.fsencode(name) + b" %d" % images.store.length(name) for name in images.names)
    return hashlib.sha256(b"\0".join(sizes)).hexdigest()
