"""What the panels of figures share: one line, dot or bar per method, in the colour of the method.

Tables are tidy: one row per value, with a column `method` whose values are keys of METHODS. seaborn
draws; means and standard deviations are over the rows that share an x, which are seeds.
"""

import math
import textwrap

import numpy as np
from pandas.api.types import is_numeric_dtype

from gear.config import UserError
from gear.figures.style import METHODS, PALETTE
from gear.runs.run import PANEL_GAP, PANEL_WIDTH

LABELS_PER_INCH = 13  # characters of a legend that fit into one inch


def named(**patterns):
    """Return {method: pattern of runs} without the methods whose pattern is ""."""
    return {name: pattern for name, pattern in patterns.items() if pattern}


def _hue(table):
    """Return seaborn's arguments that colour a table by method, in the order of METHODS."""
    present = [name for name in METHODS if name in set(table.method)]
    return {
        "data": table.assign(method=table.method.map(METHODS)),
        "hue": "method",
        "hue_order": [METHODS[name] for name in present],
        "palette": [PALETTE[name] for name in present],
    }


def _legend_entries(axis, table):
    """Give an axis one legend entry per method; `legend` collects them."""
    for name in METHODS:
        if name in set(table.method):
            axis.plot([], [], color=PALETTE[name], label=METHODS[name])


def lines(axis, table, x="step", y="value", label=None, errorbar="sd", **options):
    """Draw one line per method: the mean over seeds, with a band of one standard deviation.

    `label` names all lines together in the legend (default: each by its method). `options` go to
    seaborn's lineplot.
    """
    import seaborn

    options = {"legend": False, "err_kws": {"alpha": 0.15, "lw": 0}} | options
    if options.get("err_style") == "bars":
        options["err_kws"] = {"capsize": 2}
    if errorbar is None:
        options.pop("err_kws")
    seaborn.lineplot(x=x, y=y, errorbar=errorbar, ax=axis, **options, **_hue(table))
    if label is None:
        _legend_entries(axis, table)
    else:
        axis.plot([], [], color="#555555", ls=options.get("ls", "-"), label=label)


def dots(axis, table, x, y, order=None, dodge=0.4, marker="o", filled=True):
    """Draw one dot per row, in its method's colour; a column of names is an axis of places.

    On an axis of places (in the given `order`), the methods stand side by side, `dodge` of a place
    apart in all.
    """
    table = table if "method" in table else table.reset_index()
    methods = [name for name in METHODS if name in set(table.method)]
    names = {  # of the places on an axis, in their order
        column: methods if column == "method" else order or list(dict.fromkeys(table[column]))
        for column in (x, y)
        if not is_numeric_dtype(table[column])
    }
    is_side_by_side = names and "method" not in names
    for i, method in enumerate(methods):
        shift = dodge * (i - (len(methods) - 1) / 2) / len(methods) if is_side_by_side else 0
        values = {column: table[table.method == method][column] for column in (x, y)}
        for column in names:
            values[column] = values[column].map(names[column].index).astype(float) + shift
        colour = PALETTE[method]
        face = colour if filled else "white"
        axis.scatter(
            values[x], values[y], s=22, marker=marker, edgecolor=colour, facecolor=face, zorder=3
        )
    for column, places in names.items():
        labels = [METHODS[name] for name in places] if column == "method" else places
        if column == x:
            axis.set_xticks(range(len(places)), labels)
            axis.set_xlim(-0.6, len(places) - 0.4)
        else:  # the first place is on top
            axis.set_yticks(range(len(places)), labels)
            axis.set_ylim(len(places) - 0.4, -0.6)
    if "method" not in names:
        _legend_entries(axis, table)


def focus(axis, values, heights):
    """Fit the x axis to points but for the rows that lie far off, whose means are written at its
    edge.

    Points at one height are a row. Far off: at most a quarter of the rows, without which the others
    span less than a fifth.
    """
    values, heights = np.asarray(values, float), np.asarray(heights, float)
    means = {height: values[heights == height].mean() for height in np.unique(heights)}
    farthest = sorted(
        means, key=lambda height: abs(means[height] - np.median(values)), reverse=True
    )
    for num_far in range(1, len(farthest) // 4 + 1):
        near = values[~np.isin(heights, farthest[:num_far])]
        span = np.ptp(near)
        if not 0 < 5 * span < np.ptp(values):
            continue
        # room for a standard deviation of three points
        axis.set_xlim(near.min() - 0.25 * span, near.max() + 0.25 * span)
        for height in farthest[:num_far]:
            is_right = means[height] > near.max()
            number = f"{means[height]:.4g}"
            axis.text(
                0.98 if is_right else 0.02,
                height,
                f"{number} →" if is_right else f"← {number}",
                transform=axis.get_yaxis_transform(),
                ha="right" if is_right else "left",
                va="center",
                fontsize=8,
            )
        return


def bars(axis, table, x, y="value", null=None, dots=True):
    """Draw one bar per method and name in `x`: the mean over seeds, a dot per seed, a cross per
    `null`.
    """
    import seaborn

    arguments = {"x": x, "ax": axis, "legend": False, **_hue(table)}
    seaborn.barplot(y=y, errorbar=None, alpha=0.45 if dots else 0.85, gap=0.1, **arguments)
    if dots:
        seaborn.stripplot(y=y, dodge=True, jitter=False, size=4, **arguments)
    if null:
        crosses = {"marker": "x", "linewidth": 1.2, "size": 5}
        colour = {"palette": [PALETTE["teacher"]] * len(arguments["palette"])}
        seaborn.stripplot(y=null, dodge=True, jitter=False, **crosses, **(arguments | colour))
        axis.plot([], [], "x", color=PALETTE["teacher"], label="null")
    _legend_entries(axis, table)


def speedup_words(row):
    """Spell one row of `speedups_by_seed`: "1.20", "at least 4.00", or "not reached"."""
    if np.isnan(row.value):
        return "not reached"
    return f"{'at least ' if row.over else ''}{row.value:.2f}"


def speedup_title(mean, by_seed):
    """Title of a panel: the mean speed-up over seeds with its interval, or on how many seeds GEAR
    is sooner where one has no value.
    """
    if np.isnan(mean.value):
        return f"GEAR sooner on {(by_seed.value > 1).sum()} of {len(by_seed)} seeds"
    interval = f" [{mean.low:.2f}, {mean.high:.2f}]" if mean.seeds > 1 else ""
    return f"GEAR {mean.value:.2f}x sooner{interval}"


def speedup_dots(axis, by_seed, means):
    """Draw the speed-ups of one metric: one dot per seed, grey where the end is not reached, and
    the mean with its interval.
    """
    for place, row in enumerate(by_seed.itertuples()):
        is_reached = not np.isnan(row.value)
        height = row.value if is_reached else 1.0
        axis.scatter(place, height, s=30, color=PALETTE["GEAR"] if is_reached else "#BBBBBB")
        axis.annotate(
            speedup_words(row), (place, height), (0, 5), textcoords="offset points", ha="center"
        )
    names = [f"seed {seed}" for seed in by_seed.seed]
    for mean in means.dropna().itertuples():
        interval = [[mean.value - mean.low], [mean.high - mean.value]]
        axis.errorbar(
            len(names), mean.value, interval, fmt="D", ms=6, capsize=3, color=PALETTE["GEAR"]
        )
        names.append("mean")
    axis.axhline(1, color=PALETTE["null"], ls=":", lw=1.5)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.margins(y=0.2)


def legend(fig):
    """Put one legend above all panels: every label once, in the order of first appearance, in as
    many lines as it takes.
    """
    handles = {}
    for axis in fig.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if not handles:
        return
    characters = sum(len(label) + 8 for label in handles)  # 8 for a handle and its gaps
    num_lines = max(1, math.ceil(characters / (LABELS_PER_INCH * fig.get_figwidth())))
    fig.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=math.ceil(len(handles) / num_lines),
    )


def panel_rows(run, step=None):
    """Return the rows of a run's sample panel at `step` (default: the last): inputs,
    reconstructions, and samples if any.

    A list of (12, H, W, 3) float arrays in [0, 1]. Raises UserError where the run has no such
    panel.
    """
    paths = run.panels()
    step = max(paths, default=0) if step is None else step
    if step not in paths:
        raise UserError(
            f"run '{run.name}' has no sample panel of step {step}: it has "
            f"{', '.join(map(str, paths)) or 'none'}."
        )
    return _tiles(paths[step], run)


def sheet_rows(run, step, cfg_scale):
    """Return the rows of a run's sheet of samples at `step` and guidance `cfg_scale`: a list of
    (12, H, W, 3) float arrays in [0, 1], one sample per class in the order of the classes.

    Raises UserError where the run has no such sheet.
    """
    paths = run.sheets()
    if (step, cfg_scale) not in paths:
        present = ", ".join(f"{s} at {scale:g}" for s, scale in paths) or "none"
        raise UserError(
            f"run '{run.name}' has no sheet of samples of step {step} at guidance {cfg_scale:g}: "
            f"it has {present}. Make it: gear evaluate {run.name} --steps {step} --cfg-scale "
            f"{cfg_scale:g}"
        )
    return _tiles(paths[step, cfg_scale], run)


def _tiles(path, run):
    """Return the rows of a picture that `image_grid` made of a run's images, 12 in a row."""
    import matplotlib.pyplot

    picture = matplotlib.pyplot.imread(path)[..., :3]
    side = run.config["data"]["image_size"] + PANEL_GAP
    tiles = picture[PANEL_GAP:, PANEL_GAP:].reshape(-1, side, PANEL_WIDTH, side, 3).swapaxes(1, 2)
    return list(tiles[:, :, :-PANEL_GAP, :-PANEL_GAP])


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
    axis.tick_params(length=0)
    axis.grid(False)
    seaborn.despine(ax=axis, left=True, bottom=True)
    return lines[0].shape[1]
