"""The method as one picture (Fig. 2): the affinity A read hard and soft, and where gradients go."""

import numpy as np
import pandas as pd

from gear.figures.style import PALETTE, panels

SCORES = np.array([-1.9, -0.9, -0.25, -0.1, -0.3, -0.7, -1.4, -2.2])  # one row of A, made up
BOXES = {  # name: (x, y, width, height) in units of the canvas, text
    "image": ((0.0, 2.5, 1.0, 1.0), "image"),
    "encoder": ((1.5, 2.5, 1.3, 1.0), "encoder"),
    "affinity": ((3.3, 2.5, 1.7, 1.0), "affinity A to\nthe codebook"),
    "hard": ((5.7, 3.7, 2.1, 1.0), "hard read-out\nE[arg max A]"),
    "soft": ((5.7, 1.3, 2.1, 1.0), "soft read-out\nsoftmax(A / tau) E"),
    "generator": ((8.5, 3.7, 2.1, 1.0), "generator"),
    "frozen": ((8.5, 1.3, 2.1, 1.0), "the same generator,\nfrozen"),
    "ntp": ((11.3, 3.7, 2.2, 1.0), "next-token loss\n+ alignment loss"),
    "align": ((11.3, 1.3, 2.2, 1.0), "alignment loss"),
    "decoder": ((3.0, 0.1, 2.3, 1.0), "decoder of the chosen\ncodes: reconstruction"),
    "teacher": ((11.3, 2.65, 2.2, 0.7), "frozen teacher"),
}
FORWARD = (
    ("image", "encoder"),
    ("encoder", "affinity"),
    ("affinity", "hard"),
    ("affinity", "soft"),
    ("hard", "generator"),
    ("soft", "frozen"),
    ("generator", "ntp"),
    ("frozen", "align"),
    ("affinity", "decoder"),
    ("teacher", "ntp"),
    ("teacher", "align"),
)
BACKWARD = {  # from where the gradient starts, along boxes, to the last it reaches; the colour
    ("ntp", "generator"): PALETTE["baseline"],
    ("align", "frozen", "soft", "affinity", "encoder"): PALETTE["GEAR"],
    ("decoder", "affinity"): PALETTE["GEAR"],
}


def draw(tau):
    """Draw Fig. 2's two read-outs: returns the figure, and the table of the masses in its bars.

    The table has the columns read-out, code, mass; `tau` is the temperature of the soft one.
    """
    masses = {"hard": np.eye(len(SCORES))[SCORES.argmax()]}
    for name, temperature in (("tau = 1", 1.0), (f"tau = {tau:g}", tau)):
        weights = np.exp((SCORES - SCORES.max()) / temperature)
        masses[name] = weights / weights.sum()
    fig, (canvas, *axes) = panels("aaa;aaa;bcd", height=1.35, lettered=False)
    _draw_networks(canvas)
    for axis, (name, row) in zip(axes, masses.items()):
        colour = PALETTE["baseline"] if name == "hard" else PALETTE["GEAR"]
        axis.bar(range(1, len(row) + 1), row, color=colour, width=0.7)
        axis.set(title=f"weights, {name}", xlabel="code", ylim=(0, 1.05))
    tables = [
        pd.DataFrame({"read-out": name, "code": np.arange(1, len(row) + 1), "mass": row})
        for name, row in masses.items()
    ]
    return fig, pd.concat(tables, ignore_index=True)


def _draw_networks(canvas):
    """Draw the boxes, the forward arrows in grey, and the two gradients."""
    import matplotlib.patches

    canvas.set(xlim=(-0.1, 13.6), ylim=(0, 5.2))
    canvas.axis("off")
    look = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": "#F4F4F4", "lw": 1}
    for (x, y, width, height), text in BOXES.values():
        box = matplotlib.patches.FancyBboxPatch((x, y), width, height, ec="#555555", **look)
        canvas.add_patch(box)
        canvas.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)
    for start, end in FORWARD:
        _draw_arrow(canvas, start, end, "#555555", lw=1, shift=0)
    for path, colour in BACKWARD.items():
        for start, end in zip(path, path[1:]):
            _draw_arrow(canvas, start, end, colour, lw=2.2, shift=-0.25, ls="--")
    words = {"color": PALETTE["baseline"], "ha": "center"}
    canvas.text(9.55, 4.95, "gradient to the generator alone", **words)
    words["color"] = PALETTE["GEAR"]
    canvas.text(9.55, 0.85, "gradient to the tokenizer alone", **words)


def _draw_arrow(canvas, start, end, colour, lw, shift, ls="-"):
    """Draw an arrow between the facing sides of two boxes, moved sideways by `shift`."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = BOXES[start][0], BOXES[end][0]
    if x0 + w0 <= x1 or x1 + w1 <= x0:  # side by side: from edge to edge
        is_right = x0 < x1
        tail = (x0 + w0 if is_right else x0, y0 + h0 / 2 + shift)
        head = (x1 if is_right else x1 + w1, y1 + h1 / 2 + shift)
    else:
        is_up = y0 < y1
        tail = (x0 + w0 / 2 + shift, y0 + h0 if is_up else y0)
        head = (x1 + w1 / 2 + shift, y1 if is_up else y1 + h1)
    canvas.annotate(
        "", head, tail, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": lw, "ls": ls}
    )
