"""A report in words on the content of a source, to check one's own images before training."""

from collections import Counter

import numpy as np
from PIL import Image
from tqdm import tqdm

from gear.data.pixels import described, to_rgb
from gear.data.scenes import Scenes
from gear.data.stream import Source


def report(config, count=1_000):
    """Describe the source of a DataConfig: its classes with numbers and images, the sizes and modes
    of images, and the files that were left out.

    count: the number of images to open, a random sample of all classes; 0 opens all. Raises
    UserError as `open_source` does.
    """
    opened = Source(config)
    source = opened.split("all")
    if isinstance(source, Scenes):
        numbers = (
            f"{config.train_images} to train on, {config.val_images} to validate on, rendered on "
            "demand"
        )
        return "\n".join([f"scenes: {numbers}", *_classes(source.classes, None)])
    num_val = len(opened.split("val"))
    lines = [
        f"{config.source}: {len(source)} images, {len(source) - num_val} to train on, {num_val} to "
        f"validate on; {len(source.classes)} class{'es' if len(source.classes) > 1 else ''}"
    ]
    if source.store.top:
        lines.append(f"all of them lie in {source.store.top}, whose folders are the classes")
    lines += _classes(
        source.classes, np.bincount(source.labels(slice(None)), minlength=len(source.classes))
    )
    if source.store.census.reasons:
        lines.append(f"left out: {source.store.census}")
    return "\n".join([*lines, *_image_lines(source, source.names[: count or None])])


def _classes(classes, counts):
    """Return one line per class: number, name and, unless `counts` is None, number of images."""
    width = max(len(name) for name in classes)
    columns = [""] * len(classes) if counts is None else [f"{n:>8} images" for n in counts]
    return [
        f"{i:>6}  {name:{width}}{column}" for i, (name, column) in enumerate(zip(classes, columns))
    ]


def _image_lines(source, names):
    """Open images and return one line each on their formats, modes, sizes and irregularities."""
    num_images = Counter()  # (property, value) -> number of images
    unreadable = []
    for name in tqdm(names, "opening images", delay=2, leave=False):
        try:
            with source.store.open(name) as file, Image.open(file) as image:
                properties = described(image)
                properties["size"] = to_rgb(image).size
            num_images.update(properties.items())
        except Exception as error:  # decoders raise errors of any type
            unreadable.append(f"{name} ({error})")

    def of(key):
        """Return {value: number of images} of one property, the most common value first."""
        return {value: n for (name, value), n in num_images.most_common() if name == key}

    lines = [f"of {len(names)} images that were opened (with the number of images):"]
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
