"""What a source holds, in words: what one looks at first of one's own images."""

from collections import Counter

import numpy as np
from PIL import Image
from tqdm import tqdm

from gear.data.pixels import described, to_rgb
from gear.data.scenes import Scenes
from gear.data.stream import Source


def report(config, count=1_000):
    """Say what a DataConfig's source holds: classes with their numbers and images, sizes, modes,
    what was left out.

    `count` images, a sample of all classes, are opened (0: all of them). Raises UserError as
    `open_source` does.
    """
    opened = Source(config)
    source = opened.split("all")
    if isinstance(source, Scenes):
        numbers = (
            f"{config.train_images} to train on, {config.val_images} to validate on, drawn when "
            "they are asked for"
        )
        return "\n".join([f"scenes: {numbers}", *_classes(source.classes, None)])
    val = len(opened.split("val"))
    lines = [
        f"{config.source}: {len(source)} images, {len(source) - val} to train on, {val} to "
        "validate on; "
        f"{len(source.classes)} class{'es' if len(source.classes) > 1 else ''}"
    ]
    if source.store.top:
        lines.append(f"all of them lie in {source.store.top}, whose folders are the classes")
    lines += _classes(
        source.classes, np.bincount(source.labels(slice(None)), minlength=len(source.classes))
    )
    if source.store.census.reasons:
        lines.append(f"left out: {source.store.census}")
    return "\n".join([*lines, *_looked_at(source, source.names[: count or None])])


def _classes(classes, counts):
    width = max(len(name) for name in classes)
    counted = [""] * len(classes) if counts is None else [f"{n:>8} images" for n in counts]
    return [
        f"{i:>6}  {name:{width}}{number}" for i, (name, number) in enumerate(zip(classes, counted))
    ]


def _looked_at(source, names):
    """Open images, and say what they are like: a line each for formats, modes, sizes and
    oddities.
    """
    facts, unreadable = Counter(), []
    for name in tqdm(names, "opening images", delay=2, leave=False):
        try:
            with source.store.open(name) as file, Image.open(file) as image:
                fact = described(image)
                fact["size"] = to_rgb(image).size
            facts.update(fact.items())
        except Exception as error:  # a decoder raises whatever it likes
            unreadable.append(f"{name} ({error})")
    of = lambda key: {value: n for (k, value), n in facts.most_common() if k == key}  # noqa: E731
    lines = [f"of {len(names)} images that were opened:"]
    lines += [
        f"  {key}s: " + ", ".join(f"{v} ({n})" for v, n in of(key).items())
        for key in ("format", "mode")
    ]
    sizes = of("size")
    shown = ", ".join(f"{w} x {h} ({n})" for (w, h), n in list(sizes.items())[:5])
    lines.append(f"  sizes: {shown}{f' and {len(sizes) - 5} more' if len(sizes) > 5 else ''}")
    if turned := of("turned").get(True):
        lines.append(f"  turned upright, as their cameras noted: {turned}")
    for profile, n in of("profile").items():
        if profile:
            lines.append(f"  colour profile '{profile}', which is not applied: {n}")
    if several := sum(n for frames, n in of("frames").items() if frames > 1):
        lines.append(f"  several frames, of which the first is taken: {several}")
    if unreadable:
        lines.append(f"  cannot be read: {len(unreadable)}: {'; '.join(unreadable[:3])}")
    return lines
