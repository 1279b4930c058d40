"""Scores of scenes by the packaged detector: what each image shows, against what it should show.

`read` turns images into objects, `atoms` compares them with the objects of the scenes, and
`label_atoms` with the classes from which images were generated.
"""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from gear.data.scenes import OBJECT_FIELDS, TEXTURES, Scenes
from gear.evaluation.detector import GRID, SIDE
from gear.evaluation.scores import record
from gear.images import to_float
from gear.runs.run import open_runs

BATCH = 64
THRESHOLD = 0.3  # probability above which a cell counts as the centre of an object
MOST_OBJECTS = 5  # that are read in one image
TOLERANCE = 0.1  # largest distance of a detected centre from that of an object, in image sides
MARGIN = 0.04  # by which a centre may miss the object's ninth of the image, in image sides
UNSEEN = 3 << 41  # number of the first scene on which the detector's error is measured
NUM_UNSEEN = 1_000
ATTRIBUTES = ("shape", "texture", "colour")
PREFIX = "judge_"  # of the metrics' names
ATOMS = ["ground", "colour", "texture", "position", "shape", "class", "number", "two", "everything"]


@dataclass
class Reading:
    """What the detector says of N images. The M = 5 objects are sorted: first the one that is most
    probably in front of the others.
    """

    ground: torch.Tensor  # (N,) int64
    is_object: torch.Tensor  # (N, M) bool; the rest of an image's row has no meaning
    x: torch.Tensor  # (N, M) in image sides, as `y`
    y: torch.Tensor
    shape: torch.Tensor  # (N, M) int64, as `texture` and `colour`
    texture: torch.Tensor
    colour: torch.Tensor

    @property
    def count(self):
        """The number of objects of each image, (N,)."""
        return self.is_object.sum(1)

    def __getitem__(self, rows):
        return Reading(*(getattr(self, f.name)[rows] for f in fields(self)))


@torch.no_grad()
def read(detector, images):
    """Return the Reading of images (N, 3, H, W) in [-1, 1]."""
    device = next(detector.parameters()).device
    parts = [_read(detector(chunk.to(device))) for chunk in images.split(BATCH)]
    return _joined(parts)


def read_batches(detector, batches):
    """Return the Reading of batches of images, uint8 (n, H, W, 3)."""
    return _joined([read(detector, to_float(images)) for images in batches])


def _joined(parts):
    """Return several Readings as one, on the CPU."""
    return Reading(*(torch.cat([getattr(p, f.name) for p in parts]).cpu() for f in fields(Reading)))


def _read(outputs):
    probability = outputs["centre"][:, 0].sigmoid()
    # an object's centre is the most probable one among the cells around it
    is_peak = probability == F.max_pool2d(probability[:, None], 3, 1, 1)[:, 0]
    score = (probability * is_peak).flatten(1)
    cells = score.topk(MOST_OBJECTS).indices  # (N, M)
    is_object = score.gather(1, cells) > THRESHOLD
    at_cells = {
        name: outputs[name]
        .flatten(2)
        .gather(2, cells[:, None].expand(-1, outputs[name].shape[1], -1))
        for name in ("offset", "front", *ATTRIBUTES)
    }  # (N, C, M)
    front = at_cells["front"][:, 0].masked_fill(~is_object, -torch.inf)
    order = front.sort(dim=1, descending=True, stable=True).indices
    x = (cells % GRID + at_cells["offset"][:, 0]) / GRID
    y = (cells // GRID + at_cells["offset"][:, 1]) / GRID
    values = [is_object, x, y, *(at_cells[name].argmax(1) for name in ATTRIBUTES)]
    return Reading(outputs["ground"].argmax(1), *(value.gather(1, order) for value in values))


def matches(reading, objects):
    """Return which detected object each object of a scene is, (N, 3) int64; -1: none.

    objects: (N, 3, 7) as in `Scenes.objects`. Visible objects choose from front to back, each the
    nearest detected centre within TOLERANCE that no other has chosen.
    """
    scene = dict(zip(OBJECT_FIELDS, objects.unbind(-1)))
    distance = torch.hypot(
        scene["x"][..., None] - reading.x[:, None], scene["y"][..., None] - reading.y[:, None]
    )  # (N, 3, M)
    is_free = reading.is_object.clone()
    rows = torch.arange(len(objects))
    chosen = []
    for i in range(objects.shape[1]):
        nearest, place = distance[:, i].masked_fill(~is_free, torch.inf).min(1)
        is_match = (scene["visible"][:, i] > 0) & (nearest <= TOLERANCE)
        is_free[rows, place] &= ~is_match
        chosen.append(torch.where(is_match, place, -1))
    return torch.stack(chosen, 1)


def atoms(reading, objects):
    """Compare a Reading with the objects of the scenes that the images should show.

    Returns {name: (n,) float64 of zeros and ones}. Of every image: "ground"; "colour", "texture",
    "shape", "class" (shape and texture) and "position" (which ninth of the image) of the front
    object; "number" of objects; "everything": ground, number, and all of every visible object. Of
    images with two visible objects or more: "two", the attributes of the first two.

    The front object of a reading is the one that the detector takes for it. In "two" and
    "everything" objects are matched by their centres.
    """
    scene = dict(zip(OBJECT_FIELDS, objects.unbind(-1)))
    front = {name: reading.is_object[:, 0] for name in ("position", *ATTRIBUTES)}
    for name in ATTRIBUTES:
        front[name] = front[name] & (getattr(reading, name)[:, 0] == scene[name][:, 0])
    for axis in ("x", "y"):
        third = (scene[axis][:, 0] * 3).floor().clamp(0, 2)
        place = getattr(reading, axis)[:, 0]
        is_inside = (place >= third / 3 - MARGIN) & (place <= (third + 1) / 3 + MARGIN)
        front["position"] = front["position"] & is_inside
    chosen = matches(reading, objects)
    is_right = chosen >= 0  # (N, 3)
    for name in ATTRIBUTES:
        values = getattr(reading, name).gather(1, chosen.clamp(min=0))
        is_right = is_right & (values == scene[name])
    is_visible = scene["visible"] > 0
    ground = reading.ground == scene["ground"][:, 0]
    number = reading.count == is_visible.sum(1)
    rank = is_visible.cumsum(1)  # 1 for the first visible object
    has_two = rank[:, -1] >= 2
    two = (is_right | ~is_visible | (rank > 2)).all(1)[has_two]
    everything = ground & number & (is_right | ~is_visible).all(1)
    named = {
        "ground": ground,
        "colour": front["colour"],
        "texture": front["texture"],
        "position": front["position"],
        "shape": front["shape"],
        "class": front["shape"] & front["texture"],
        "number": number,
        "two": two,
        "everything": everything,
    }
    return {name: value.double() for name, value in named.items()}


def label_atoms(reading, labels):
    """Compare a Reading with the classes (N,) from which images were generated.

    Returns {"texture", "shape", "class"} of the front object, as in `atoms`.
    """
    is_object = reading.is_object[:, 0]
    texture = is_object & (reading.texture[:, 0] == labels % len(TEXTURES))
    shape = is_object & (reading.shape[:, 0] == labels // len(TEXTURES))
    named = {"texture": texture, "shape": shape, "class": texture & shape}
    return {name: value.double() for name, value in named.items()}


def detection_error(reading, objects):
    """Return the detector's own error on scenes: "recall" of visible objects, "precision" of
    detected ones, and of the matched ones the share with the right "shape", "texture" and
    "colour".
    """
    scene = dict(zip(OBJECT_FIELDS, objects.unbind(-1)))
    chosen = matches(reading, objects)
    is_match = chosen >= 0
    values = {
        "recall": float(is_match.sum() / (scene["visible"] > 0).sum()),
        "precision": float(is_match.sum() / reading.is_object.sum().clamp(min=1)),
    }
    for name in ATTRIBUTES:
        is_right = getattr(reading, name).gather(1, chosen.clamp(min=0)) == scene[name]
        values[name] = float(is_right[is_match].double().mean())
    return values


def unseen_error(detector):
    """Return the `detection_error` of a detector on 1,000 scenes that no network was trained on."""
    scenes = Scenes(UNSEEN, NUM_UNSEEN, SIDE)
    positions = np.arange(NUM_UNSEEN)
    images = to_float(torch.from_numpy(scenes.images(positions)))
    objects = torch.from_numpy(scenes.objects(positions))
    return detection_error(read(detector, images), objects)


# -- records ---------------------------------------------------------------------------------------


def sample_records(detector, batches, labels, protocol):
    """Return records of samples, uint8 batches (n, H, W, 3), against the classes (N,) that they
    were generated from, and against shuffled classes: what chance gives.
    """
    reading = read_batches(detector, batches)
    labels = labels[: len(reading.ground)]
    shuffled = labels[_shuffled(len(labels))]
    return [
        *_records(label_atoms(reading, labels), protocol | {"of": "samples"}),
        *_records(label_atoms(reading, shuffled), protocol | {"of": "samples, shuffled labels"}),
    ]


def ceilings(detector, images, decoded, objects, protocol):
    """Return records of scenes, images (N, 3, H, W) with their `objects`, of their reconstructions
    `decoded`, and of the scenes against the objects of other scenes: what chance gives.
    """
    protocol = protocol | {"images": len(images)}
    real, reconstructed = read(detector, images), read(detector, decoded)
    shuffled = objects[_shuffled(len(objects))]
    return [
        *_records(atoms(real, objects), protocol | {"of": "real scenes"}),
        *_records(atoms(reconstructed, objects), protocol | {"of": "reconstructions"}),
        *_records(atoms(real, shuffled), protocol | {"of": "real scenes, shuffled"}),
    ]


def _records(values, protocol):
    return [record(f"{PREFIX}{name}", value, protocol) for name, value in values.items()]


def _shuffled(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def judged(runs):
    """Return what the detector said of the images of runs, one row per number.

    runs: a pattern of names, or Runs. Columns: run, seed, step, cfg_scale (missing for
    reconstructions and real scenes), of (the kind of image), metric (one of ATOMS, or
    "fd", the Fréchet distance in the detector's space), value. A run that was not judged has no
    rows.
    """
    lines = []
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        for entry in run.scores():
            metric, stated = entry["metric"], entry["protocol"]
            if metric.startswith(PREFIX):
                metric, of = metric.removeprefix(PREFIX), stated.get("of")
            elif metric == "fd_detector":
                metric, of = "fd", "samples"
            else:
                continue
            place = (stated.get("step"), stated.get("cfg_scale"))
            line = (run.name, run.config["seed"], *place, of)
            lines.append((*line, metric, entry["value"]))
    columns = ["run", "seed", "step", "cfg_scale", "of", "metric", "value"]
    return pd.DataFrame(lines, columns=columns)


def judge_table(runs):
    """Return `judged` without distances, wide: the shares of images in [0, 1], one row per run,
    step, guidance scale and kind of image, one column per property.
    """
    table = judged(runs)
    table = table[table.metric.isin(ATOMS)].astype(object)
    index = ["run", "step", "cfg_scale", "of"]
    # real scenes have no guidance, and a file changed by hand may state anything
    table[index] = table[index].map(
        lambda v: v if isinstance(v, (int, float, str)) and v == v else ""
    )
    table["value"] = table.value.astype(float)
    wide = table.pivot_table(
        index=index, columns="metric", values="value", aggfunc="last", sort=False
    )
    return wide.reindex(columns=ATOMS)
