"""How figures look, and how they are kept: PNG, PDF and the CSV of what is drawn, byte for byte the
same each time.

figures/NAME.png         the figure
        index.html       the page of all (gear.figures.gallery)
        pdf/NAME.pdf
        data/NAME.csv    the numbers drawn, rounded, with provenance in the first line
             NAME.json   what is said of the figure
"""

import json
import math
import textwrap

import numpy as np

from gear.config import UserError
from gear.files import figures_dir, kept_json, read_text, write_atomically
from gear.runs.run import PANEL_GAP, PANEL_WIDTH
from gear.tokenizer.config import token_grid

FOLDERS = {"png": "", "pdf": "pdf", "csv": "data", "json": "data"}  # in the folder of figures
PALETTE = {
    "LlamaGen": "#8FB4DE",
    "warm-up": "#3B6FB6",  # the paper draws LlamaGen-REPA in blue and GEAR in red
    "control": "#8A8F98",
    "GEAR": "#C8442E",
    "transfer": "#E09A7A",
    "half": "#3B9A8B",
    "naive": "#7A4FA3",
    "naive inputs": "#C08AD6",
    "straight-through": "#D98B2B",
    "no GAN": "#6B8E3D",
    "teacher": "#2B2B2B",
    "null": "#B9A44C",
}
METHODS = {
    "LlamaGen": "LlamaGen (no alignment)",
    "warm-up": "LlamaGen-REPA (warm-up)",
    "control": "control (no guidance)",
    "half": "half the codes",
    "GEAR": "GEAR",
    "transfer": "fresh generator on GEAR's tokenizer",
    "naive": "NTP through inputs and targets",
    "naive inputs": "NTP through inputs",
    "straight-through": "straight-through alignment",
    "no GAN": "GEAR without adversarial loss",
}


def use_style():
    """Set the house style: sizes that stay legible at a README's width, embedded fonts, no date in
    files.
    """
    import matplotlib
    import seaborn  # 1.2 s, for which a command that draws nothing has no use

    seaborn.set_theme(style="ticks", context="paper")
    matplotlib.rcParams |= {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9.5,
        "legend.fontsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E9E9E9",
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
        "axes.formatter.useoffset": False,
        "svg.hashsalt": "gear",
        "axes.titlelocation": "left",
    }


def rounded(table):
    """Round a table's numbers to six significant digits: what is drawn is what the CSV says, on
    every machine.
    """
    table = table.copy()
    for column in table.select_dtypes("floating"):
        values = table[column].to_numpy(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            digits = 5 - np.floor(np.log10(np.abs(values)))
        table[column] = [
            round(v, int(d)) if np.isfinite(d) else v for v, d in zip(values.tolist(), digits)
        ]
    return table


def panels(layout, width=9.0, height=2.6):
    """Make a figure of lettered panels: `layout` names one by each letter, rows parted by
    semicolons, as in "abc;dde".

    Returns (figure, list of axes by letter); `height` is a row's, in inches.
    """
    import matplotlib.pyplot

    use_style()
    rows = layout.count(";") + 1
    fig, axes = matplotlib.pyplot.subplot_mosaic(
        layout, figsize=(width, height * rows), layout="constrained"
    )
    for letter, axis in axes.items():
        axis.text(
            -0.02,
            1.03,
            f"({letter})",
            transform=axis.transAxes,
            ha="right",
            va="bottom",
            weight="bold",
        )
    return fig, list(axes.values())


def legend(fig):
    """Put one legend above all panels: every label once, in the order of first appearance, in as
    many lines as it takes.
    """
    found = {}
    for axis in fig.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    # characters, handles and gaps among them; about 13 go to an inch
    wide = sum(len(label) + 8 for label in found)
    lines = max(1, math.ceil(wide / (13 * fig.get_figwidth())))
    fig.legend(
        found.values(),
        found.keys(),
        loc="outside upper center",
        ncols=math.ceil(len(found) / lines),
    )


def focus(axis, values, heights):
    """Fit the x axis to points but for the lines that lie far off, which are named at its edge, by
    their mean.

    Points at one height are a line. Far off: at most a quarter of the lines, without which the rest
    span less than a fifth.
    """
    values, heights = np.asarray(values, float), np.asarray(heights, float)
    means = {height: values[heights == height].mean() for height in np.unique(heights)}
    far = sorted(means, key=lambda height: abs(means[height] - np.median(values)), reverse=True)
    for n in range(1, len(far) // 4 + 1):
        near = values[~np.isin(heights, far[:n])]
        low, high, span = near.min(), near.max(), np.ptp(near)
        if 0 < 5 * span < np.ptp(values):
            # room for a standard deviation of three points
            axis.set_xlim(low - 0.25 * span, high + 0.25 * span)
            for height in far[:n]:
                text, x, side = (
                    f"{means[height]:.4g}",
                    *((0.98, "right") if means[height] > high else (0.02, "left")),
                )
                text = f"{text} →" if side == "right" else f"← {text}"
                axis.text(
                    x,
                    height,
                    text,
                    transform=axis.get_yaxis_transform(),
                    ha=side,
                    va="center",
                    fontsize=7.5,
                )
            return


def scale(runs):
    """Name the scale of what is drawn: data, image size, token grid, K, steps, seeds; where runs
    differ, each value.
    """
    configs = [run.config for run in runs]
    side, (tokens, _) = configs[0]["data"]["image_size"], token_grid(configs[0])
    source = configs[0]["data"]["source"].rstrip("/").split("/")[-1]
    codes = " and ".join(dict.fromkeys(str(c["tokenizer"]["codebook_size"]) for c in configs))
    steps = " and ".join(dict.fromkeys(str(c["steps"]) for c in configs))
    seeds = sorted({c["seed"] for c in configs})
    return (
        f"Small scale: {source} {side} px, {tokens}x{tokens} tokens, K = {codes}, {steps} steps of "
        f"{configs[0]['batch_size']}; "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    )


def panel_rows(run, step=None):
    """Return the rows of a run's sample panel at `step` (default: the last): inputs,
    reconstructions, and samples if any.

    A list of (12, H, W, 3) float arrays in [0, 1]. Raises UserError where the run has no such
    panel.
    """
    import matplotlib.pyplot

    paths = run.panels()
    step = max(paths, default=0) if step is None else step
    if step not in paths:
        raise UserError(
            f"run '{run.name}' has no sample panel of step {step}: it has "
            f"{', '.join(map(str, paths)) or 'none'}."
        )
    picture, side = (
        matplotlib.pyplot.imread(paths[step])[..., :3],
        run.config["data"]["image_size"] + PANEL_GAP,
    )
    tiles = picture[PANEL_GAP:, PANEL_GAP:].reshape(-1, side, PANEL_WIDTH, side, 3).swapaxes(1, 2)
    return list(tiles[:, :, :-PANEL_GAP, :-PANEL_GAP])


def show_panels(axis, rows, steps, count=3):
    """Draw what runs' sample panels show over training: `rows` is {label: (run, row of its panel)},
    a line each.

    A block of `count` images for each of `steps`; blank where a run has no panel of that step.
    """
    lines = {}
    for label, (run, row) in rows.items():
        held = {step: panel_rows(run, step)[row][:count] for step in run.panels()}
        blank = np.ones_like(next(iter(held.values())))
        lines[label] = np.concatenate([held.get(step, blank) for step in steps])
    width = show_rows(axis, lines) / len(steps)
    axis.set_xticks(
        [(i + 0.5) * width for i in range(len(steps))], [f"step {step}" for step in steps]
    )


def show_rows(axis, rows):
    """Draw {label: (n, h, w, 3) in [0, 1]}, a line of n square tiles each, small ones enlarged;
    returns the width in pixels.
    """
    import seaborn

    side, lines = max(tiles.shape[1] for tiles in rows.values()), []
    for tiles in rows.values():
        tiles = np.repeat(np.repeat(tiles, side // tiles.shape[1], 1), side // tiles.shape[2], 2)
        gap = (max(1, side // 32),) * 2
        lines.append(
            np.concatenate(np.pad(tiles, ((0, 0), gap, gap, (0, 0)), constant_values=1), axis=1)
        )
    axis.imshow(np.concatenate(lines), interpolation="nearest")
    # a file's name may be long
    labels = ["\n".join(textwrap.fill(line, 22) for line in label.split("\n")) for label in rows]
    axis.set_yticks([(i + 0.5) * len(lines[0]) for i in range(len(rows))], labels)
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=7.5)
    axis.grid(False)
    seaborn.despine(ax=axis, left=True, bottom=True)
    return lines[0].shape[1]


def save(fig, name, runs, data, n, interval, null="none", face=None):
    """Write NAME.png, pdf/NAME.pdf and data/NAME.csv with provenance (runs, steps, configuration
    hashes; no date).

    `runs` are the Runs drawn, or what else has a name, a step and a config_hash; `data` the table
    of plotted numbers, `rounded`. On the figure's face stand the scale (or `face` in its place)
    and, in words: `n`, what was measured on, `interval`, what bands and bars are, and `null`, the
    level that means nothing.
    """
    statistics = {"n": n, "interval": interval, "null": null}
    told = [
        face or scale(runs),
        ". ".join(f"{key}: {value}" for key, value in statistics.items()) + ".",
    ]
    wide = int(fig.get_figwidth() * 17)  # characters of this size in a line
    told = "\n".join(line for text in told for line in textwrap.wrap(text, wide))
    fig.supxlabel(told, fontsize=8, color="#666666", x=0.01, ha="left")
    found = {r.name: {"step": r.step, "config": r.config_hash} for r in runs}
    provenance = json.dumps(
        {"figure": name, "runs": found, "statistics": statistics}, sort_keys=True
    )
    writers = {
        "png": lambda p: fig.savefig(
            p, format="png", metadata={"Software": None, "Description": provenance}
        ),
        "pdf": lambda p: fig.savefig(
            p,
            format="pdf",
            metadata={
                "CreationDate": None,
                "Producer": None,
                "Creator": "gear",
                "Subject": provenance,
            },
        ),
        "csv": lambda p: p.write_text(
            f"# {provenance}\n" + rounded(data).to_csv(index=False, lineterminator="\n")
        ),
    }
    for suffix, write in writers.items():
        write_atomically(figure_path(name, suffix), write)


def figure_path(name, suffix):
    """Return where a figure's "png", "pdf", "csv" or "json" is kept."""
    return figures_dir() / FOLDERS[suffix] / f"{name}.{suffix}"


def runs_of(name):
    """Return the runs in a figure's CSV, {run: {"step", "config"}}; none where it is absent or its
    first line damaged.
    """
    try:
        runs = json.loads(
            read_text(figure_path(name, "csv")).partition("\n")[0].removeprefix("# ")
        )["runs"]
        return runs if all(made.keys() >= {"step", "config"} for made in runs.values()) else {}
    except (AttributeError, LookupError, RecursionError, TypeError, UserError, ValueError):
        return {}


def kept_words(name):
    """Return what data/NAME.json says of a figure, {} where it is absent or damaged."""
    words = kept_json(figure_path(name, "json"))
    kinds = dict(
        title=str,
        place=str,
        claim=str,
        command=str,
        parameters=dict,
        said=list,
        scale=str,
        needs=str,
    )
    return (
        words
        if isinstance(words, dict)
        and all(isinstance(words.get(k), kind) for k, kind in kinds.items())
        else {}
    )
