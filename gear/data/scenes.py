"""The procedural source `scenes`: coloured, textured shapes on 1/f backgrounds, with the factors
that generated them.

Each scene is a function of its number alone, so that any part of the stream can be rendered on any
machine at any time. The front object determines the class (shape x texture). Up to two more objects
are behind it, independent of the class, so that class and position do not determine what a patch
shows.
"""

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "striped", "checked", "dotted")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (235, 137, 28),
    "yellow": (240, 210, 50),
    "green": (52, 168, 83),
    "cyan": (40, 190, 200),
    "blue": (45, 95, 215),
    "purple": (146, 62, 190),
    "white": (236, 236, 236),
}
GROUNDS = {
    "grey": (120, 122, 126), "brown": (112, 84, 62), "teal": (52, 98, 98),
    "olive": (104, 108, 58), "navy": (48, 58, 98), "rose": (150, 106, 112),
}  # fmt: skip
NUM_CLASSES = len(SHAPES) * len(TEXTURES)
OBJECTS = 3  # the front object, which determines the class, and at most two behind it
PRESENCE = (1.0, 0.8, 0.4)  # probability that each object is present
FACTORS = {  # factor -> number of its values; 0 means background, except for the ground
    "shape": len(SHAPES) + 1,
    "texture": len(TEXTURES) + 1,
    "colour": len(COLOURS) + 1,
    "ground": len(GROUNDS),
}


MOST_HIDDEN = 0.75  # share of an object that may be hidden before it no longer counts as visible
FEWEST_PIXELS = 20  # of a visible object, in an image of 32 x 32 pixels
# what `Scenes.objects` states of an object; x and y are in [0, 1], the others whole numbers
OBJECT_FIELDS = ("visible", "x", "y", "shape", "texture", "colour", "ground")


class Scenes:
    """The scenes with the numbers `first` to `first + length`, exclusive, of `size` pixels.

    `images`, `labels`, `factors` and `captions` take an array of positions in [0, length).
    """

    def __init__(self, first, length, size):
        self.first = first
        self.length = length
        self.size = size
        self.classes = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]

    def __len__(self):
        return self.length

    def identity(self):
        return f"scenes {self.first} to {self.first + self.length}"

    def order(self, rng):
        return rng.permutation(len(self))

    def is_cropped(self):
        return False

    def labels(self, positions):
        """Return the class of each scene, (B,) int64 in [0, 24).

        The class is shape * 4 + texture of the front object.
        """
        front = self._draw(positions, noise=False)
        return front["shape"][:, 0] * len(TEXTURES) + front["texture"][:, 0]

    def images(self, positions):
        """Render scenes: positions (B,) -> (B, size, size, 3) uint8."""
        return self._render(self._draw(positions))[0]

    def factors(self, positions, patch):
        """Return the factors of each patch, (B, size/patch, size/patch, 4) int64: shape, texture,
        colour, ground colour.

        A patch belongs to the object, or the background, that covers most of it. The first three
        factors count from 1; 0 is background. patch: its side in pixels.
        """
        draw = self._draw(positions)
        owner = self._render(draw)[1]  # (B, S, S): 0 is background, i + 1 is object i
        b = len(owner)
        g = self.size // patch
        cover = np.stack([owner == i for i in range(OBJECTS + 1)], -1)  # (B, S, S, 4)
        top = cover.reshape(b, g, patch, g, patch, -1).mean((2, 4)).argmax(-1)  # (B, g, g)
        pick = [
            np.take_along_axis(
                np.pad(draw[k] + 1, ((0, 0), (1, 0))), top.reshape(b, -1), 1
            ).reshape(b, g, g)
            for k in ("shape", "texture", "colour")
        ]
        ground = np.broadcast_to(draw["ground"][:, None, None], (b, g, g))
        return np.stack([*pick, ground], -1).astype(np.int64)

    def objects(self, positions):
        """Return the objects of each scene from front to back, (B, 3, 7) float32, with the values
        of OBJECT_FIELDS; the ground's colour is repeated.

        An object is visible if at least 20 of 32 x 32 pixels, and a quarter of it, can be seen.
        """
        draw = self._draw(positions)
        _, owner, areas = self._render(draw)
        seen = np.stack([(owner == i + 1).sum((1, 2)) for i in range(OBJECTS)], 1)
        fewest = FEWEST_PIXELS * (self.size / 32) ** 2
        draw["visible"] = (seen >= fewest) & (seen >= (1 - MOST_HIDDEN) * areas)
        draw["ground"] = np.repeat(draw["ground"][:, None], OBJECTS, 1)
        return np.stack([draw[name] for name in OBJECT_FIELDS], -1).astype(np.float32)

    def captions(self, positions):
        """Describe each scene in one exact sentence: every visible object from front to back with
        its position, and the ground.
        """
        draw = self._draw(positions)
        sentences = []
        owner = self._render(draw)[1]
        colours = list(COLOURS)
        grounds = list(GROUNDS)
        for b in range(len(draw["ground"])):
            parts = []
            for i in (i for i in range(OBJECTS) if (owner[b] == i + 1).any()):
                column = ("left", "centre", "right")[min(int(draw["x"][b, i] * 3), 2)]
                row = ("top", "middle", "bottom")[min(int(draw["y"][b, i] * 3), 2)]
                size = "large" if draw["radius"][b, i] > 0.24 else "small"
                description = (
                    f"{colours[draw['colour'][b, i]]} {TEXTURES[draw['texture'][b, i]]} "
                    f"{SHAPES[draw['shape'][b, i]]}"
                )
                parts.append(f"a {size} {description} at the {row} {column}")
            sentences.append(
                f"{', behind it '.join(parts)}, on a {grounds[draw['ground'][b]]} ground"
            )
        return sentences

    def _draw(self, positions, noise=True):
        """Draw the random factors of scenes, as a dict of arrays (B, OBJECTS); ground and light are
        (B,).

        With `noise`, the random numbers of the background and of the colours are added.
        """
        generators = [
            np.random.Generator(np.random.Philox(key=self.first + int(p)))
            for p in np.atleast_1d(positions)
        ]
        u = np.stack([g.random((OBJECTS, 9)) for g in generators])  # (B, OBJECTS, 9)
        integer = lambda column, n: (u[..., column] * n).astype(np.int64)  # noqa: E731
        radius = np.array([0.23, 0.18, 0.15]) + u[..., 4] * np.array([0.11, 0.10, 0.09])
        draw = {
            "shape": integer(0, len(SHAPES)),
            "texture": integer(1, len(TEXTURES)),
            "colour": integer(2, len(COLOURS)),
            "present": u[..., 3] < PRESENCE,
            "radius": radius,
            "x": 0.18 + 0.64 * u[..., 5],
            "y": 0.18 + 0.64 * u[..., 6],
            "phase": u[..., 7],
            "ground": (u[:, 0, 8] * len(GROUNDS)).astype(np.int64),
            "light": u[:, 1, 8],
        }
        if noise:
            draw["noise"] = np.stack(
                [g.standard_normal((2, self.size, self.size // 2 + 1)) for g in generators]
            )
            draw["jitter"] = np.stack([g.random((OBJECTS + 1, 3)) for g in generators]) - 0.5
        return draw

    def _render(self, draw):
        """Paint scenes from back to front.

        Returns images (B, S, S, 3) uint8, the owner of each pixel, (B, S, S): 0 is background,
        i + 1 is object i; and the pixels that each object has, seen or hidden, (B, 3).
        """
        size = self.size
        b = len(draw["ground"])
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        image = self._ground(draw, axis)
        owner = np.zeros((b, size, size), np.int64)
        areas = np.zeros((b, OBJECTS), np.int64)
        palette = np.array(list(COLOURS.values()), np.float32) / 255
        for i in reversed(range(OBJECTS)):
            rows = np.flatnonzero(draw["present"][:, i])
            factors = {key: draw[key][rows, i] for key in ("shape", "texture", "colour", "jitter")}
            x, y, radius, phase = (
                draw[k][rows, i].astype(np.float32)[:, None, None]
                for k in ("x", "y", "radius", "phase")
            )
            u = (axis[None, None, :] - x) / radius  # object coordinates: the radius is 1
            v = (axis[None, :, None] - y) / radius
            shadow = 1 / (1 + np.exp(np.minimum(6 * (np.hypot(u - 0.2, v - 0.3) - 1), 30)))
            below = image[rows] * (1 - 0.35 * shadow)[..., None]
            # signed distance to the outline, in pixels
            distance = _by_kind(DISTANCES, factors["shape"], u, v) * radius * size
            mask = np.clip(0.5 - distance, 0, 1)
            darkness = _by_kind(DARKNESSES, factors["texture"], u, v, phase)
            colour = palette[factors["colour"]] + 0.12 * factors["jitter"]
            paint = colour[:, None, None] * (1 - 0.6 * darkness)[..., None]
            image[rows] = below + mask[..., None] * (paint - below)
            owner[rows] = np.where(mask > 0.5, i + 1, owner[rows])
            areas[rows, i] = (mask > 0.5).sum((1, 2))
        return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), owner, areas

    def _ground(self, draw, axis):
        """Paint backgrounds of one colour, a gradient of light and 1/f noise: (B, S, S, 3) float32,
        about in [0, 1].
        """
        size = self.size
        frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
        spectrum = (
            (draw["noise"][:, 0] + 1j * draw["noise"][:, 1])
            / np.maximum(frequency, 1 / size)
            * (frequency > 0)
        )
        field = np.fft.irfft2(spectrum, s=(size, size))
        field /= field.std(axis=(1, 2), keepdims=True)
        angle = 2 * np.pi * draw["light"][:, None, None]
        slope = np.cos(angle) * (axis[None, None, :] - 0.5) + np.sin(angle) * (
            axis[None, :, None] - 0.5
        )
        colour = (
            np.array(list(GROUNDS.values()), np.float32)[draw["ground"]] / 255
            + 0.08 * draw["jitter"][:, -1]
        )
        return (colour[:, None, None] * (1 + 0.05 * field + 0.35 * slope)[..., None]).astype(
            np.float32
        )


def _by_kind(formulas, kinds, *coordinates):
    """Apply formulas[kinds[b]] to the coordinates of each scene b: (B, S, S) float64.

    kinds: (B,) integers. coordinates: arrays (B, 1 or S, 1 or S).
    """
    values = np.empty(np.broadcast_shapes(*(c.shape for c in coordinates)))
    for kind, formula in enumerate(formulas):
        rows = np.flatnonzero(kinds == kind)
        values[rows] = formula(*(c[rows] for c in coordinates))
    return values


def _triangle(u, v):
    return np.maximum(v - 0.65, 0.85 * (np.abs(u) - 0.6 * (v + 1)))


def _cross(u, v):
    au = np.abs(u)
    av = np.abs(v)
    return np.minimum(np.maximum(au - 1, av - 0.34), np.maximum(au - 0.34, av - 1))


DISTANCES = (  # signed distance to the outline of each of SHAPES; negative inside
    lambda u, v: np.hypot(u, v) - 1,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.85,
    _triangle,
    lambda u, v: (np.abs(u) + np.abs(v) - 1.15) / np.sqrt(2),
    lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.28,
    _cross,
)


def _wave(x, phase):
    return np.sin(2 * np.pi * (x / 1.1 + phase))


def _soft(x):
    return np.clip(0.5 + 2 * x, 0, 1)


DARKNESSES = (  # darkness in [0, 1] at a point of each of TEXTURES
    lambda u, v, phase: 0.0,
    lambda u, v, phase: _soft(_wave(u + v, phase)),
    lambda u, v, phase: _soft(_wave(u, phase) * _wave(v, phase)),
    lambda u, v, phase: _soft(_wave(u, phase) + _wave(v, phase) - 0.8),
)
