"""How figures look, and how they are saved: PNG, PDF and a CSV of the numbers, with the same bytes
each time.

figures/NAME.png         the figure
        index.html       the page of all (gear.figures.gallery)
        pdf/NAME.pdf
        data/NAME.csv    the numbers drawn, rounded, with provenance in the first line
             NAME.json   the words that go with the figure
"""

import json
import textwrap

import numpy as np

from gear.config import UserError
from gear.files import figures_dir, kept_json, read_text, write_atomically
from gear.tokenizer.config import token_grid

FOLDERS = {"png": "", "pdf": "pdf", "csv": "data", "json": "data"}  # in the folder of figures
PALETTE = {
    "LlamaGen": "#8FB4DE",
    "baseline": "#3B6FB6",  # the paper draws LlamaGen-REPA in blue and GEAR in red
    "warm-up": "#3B6FB6",
    "public weights": "#5F7A96",
    "public weights, bilinear": "#B9C7D6",
    "control": "#8A8F98",
    "GEAR": "#C8442E",
    "transfer": "#E09A7A",
    "half": "#3B9A8B",
    "naive": "#7A4FA3",
    "naive inputs": "#C08AD6",
    "straight-through": "#D98B2B",
    "no GAN": "#6B8E3D",
    "no warm-up": "#A3672F",
    "teacher": "#2B2B2B",
    "other": "#8A8F98",
    "null": "#B9A44C",
}
METHODS = {
    "LlamaGen": "LlamaGen (no alignment)",
    "baseline": "baseline (LlamaGen-REPA)",
    "warm-up": "warm-up",
    "control": "control (no guidance)",
    "half": "half the codes",
    "transfer": "fresh generator on GEAR's tokenizer",
    "GEAR": "GEAR",
    "naive": "NTP through inputs and targets",
    "naive inputs": "NTP through inputs",
    "straight-through": "straight-through alignment",
    "no GAN": "GEAR without adversarial loss",
    "no warm-up": "GEAR from nothing",
    "public weights": "public weights",
    "public weights, bilinear": "public weights, bilinear filter",
}


def use_style():
    """Set the style: sizes that are legible at a README's width, embedded fonts, no dates in
    files.
    """
    import matplotlib
    import seaborn  # 1.2 s, which a command that draws nothing need not wait

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
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
    }


def rounded(table):
    """Round a table's numbers to six significant digits, so that the figure shows what the CSV
    holds, on every machine.
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


def panels(layout, width=9.0, height=2.6, lettered=True):
    """Make a figure of panels: each letter of `layout` is one panel, semicolons separate rows, as
    in "abc;dde".

    Returns (figure, list of axes in the order of letters). `width` is the figure's and `height` one
    row's, in inches: at 9 inches, type of 9 points is legible at a README's width. Letters are
    written beside the titles unless `lettered` is false.
    """
    import matplotlib.pyplot

    use_style()
    rows = layout.count(";") + 1
    fig, axes = matplotlib.pyplot.subplot_mosaic(
        layout, figsize=(width, height * rows), layout="constrained"
    )
    for letter, axis in axes.items() if lettered else ():
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


def scale(runs):
    """Name the scale of runs: data, image size, token grid, K, steps, seeds; each value where runs
    differ.
    """
    configs = [run.config for run in runs]
    side, (tokens, _) = configs[0]["data"]["image_size"], token_grid(configs[0])
    source = configs[0]["data"]["source"].rstrip("/").split("/")[-1]
    codes = " and ".join(dict.fromkeys(str(c["tokenizer"]["codebook_size"]) for c in configs))
    steps = " and ".join(dict.fromkeys(str(c["steps"]) for c in configs))
    seeds = sorted({c["seed"] for c in configs})
    return (
        f"Small scale: {source} {side} px, {tokens}x{tokens} tokens, K = {codes}, {steps} steps, "
        f"batch {configs[0]['batch_size']}; "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    )


def save(fig, name, runs, data, n, interval, null="none", face=None):
    """Write NAME.png, pdf/NAME.pdf and data/NAME.csv with provenance (runs, steps, configuration
    hashes; no date).

    `runs` are the Runs drawn (anything with a name, a step and a config_hash), and `data` is the
    table of plotted numbers, `rounded`. Below the panels the figure prints the scale (or `face` in
    its place) and three sentences: `n`, what was measured; `interval`, what bands and bars are; and
    `null`, the level that means nothing.
    """
    statistics = {"n": n, "interval": interval, "null": null}
    printed = [f"{k}: {v}" for k, v in statistics.items() if not v.startswith("none")]
    sentences = [face or scale(runs), ". ".join(printed) + "."]
    characters = int(fig.get_figwidth() * 16)  # of 8-point type in one line
    lines = [line for text in sentences for line in textwrap.wrap(text, characters)]
    fig.supxlabel("\n".join(lines), fontsize=8, color="#666666", x=0.01, ha="left")
    drawn_runs = {run.name: {"step": run.step, "config": run.config_hash} for run in runs}
    provenance = json.dumps(
        {"figure": name, "runs": drawn_runs, "statistics": statistics}, sort_keys=True
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
    """Return the path of a figure's "png", "pdf", "csv" or "json"."""
    return figures_dir() / FOLDERS[suffix] / f"{name}.{suffix}"


def runs_of(name):
    """Return the runs in a figure's CSV, {run: {"step", "config"}}; {} where the file is absent or
    its first line damaged.
    """
    try:
        runs = json.loads(
            read_text(figure_path(name, "csv")).partition("\n")[0].removeprefix("# ")
        )["runs"]
        return runs if all(made.keys() >= {"step", "config"} for made in runs.values()) else {}
    except (AttributeError, LookupError, RecursionError, TypeError, UserError, ValueError):
        return {}


def kept_words(name):
    """Return the words of data/NAME.json, {} where the file is absent or damaged."""
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
