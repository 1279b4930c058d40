"""Runs side by side, and a run while it trains: what one can turn in the notebook `runs`. No
weights are needed.
"""

import asyncio
import contextlib
import functools
import math
import time

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogFormatter
from PIL import Image

from gear.config import NonNegative, UserError, check_value, flatten
from gear.figures.style import PALETTE, use_style
from gear.interactive.widgets import Panel
from gear.runs.run import Run, run_names

ALL = "(all)"
LINES = ("-", "--", ":", "-.")
SHOWN = 9  # runs selected of those a filter finds, where none was
RECENT = 20  # lines of timing.jsonl that tell the speed
ALIVE = 60  # seconds without a line, after which a run no longer seems to train
SECONDS = 2.0  # between two looks at a run that trains


# -- what is known of runs -------------------------------------------------------------------------


def overview(names):
    """List runs: a table indexed by run, with stage, recipe, seed, steps, step and whether the
    weights are there.
    """
    rows = {}
    for run in map(Run.open, names):
        described = {key: run.config.get(key) for key in ("stage", "recipe", "seed", "steps")}
        rows[run.name] = described | {
            "step": run.logged_step,
            "weights": bool(run.checkpoint_steps()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def differing(names):
    """Table the fields in which the configurations of runs differ: a row a field ("objective.tau"),
    a column a run.
    """
    table = pd.DataFrame(
        {name: pd.Series(flatten(Run.open(name).config), dtype=object) for name in names}
    ).fillna("")
    return table[table.astype(str).nunique(axis=1) > 1]


def metrics(name):
    """Return a run's metrics, read again only when there are more of them."""
    path = Run.open(name).path
    file = path / "metrics.jsonl"
    return _metrics(path, file.stat().st_size if file.exists() else 0)


@functools.lru_cache(maxsize=64)
def _metrics(path, size):
    return Run.open(path.name).metrics()


def written(run):
    """Return when a run last wrote metrics or samples, in seconds since the epoch."""
    files = [path for pattern in ("*.json*", "samples/*") for path in run.path.glob(pattern)]
    return max((path.stat().st_mtime for path in files), default=0.0)


def progress(run):
    """Say how far a run is: {step, steps, speed in images/s over its last lines, seconds left at
    that speed, seconds_since}.

    `seconds_since` it wrote anything. Speed and time left are NaN where nothing was timed
    (records).
    """
    config, step, timed = run.config, run.logged_step, ["images_per_second", "seconds"]
    timing = run.metrics("timing.jsonl").reindex(columns=timed).dropna().tail(RECENT)
    speed = (
        np.average(timing["images_per_second"], weights=timing["seconds"])
        if timing["seconds"].sum() > 0
        else math.nan
    )
    left = (config["steps"] - step) * config["batch_size"] / speed
    since = time.time() - written(run)
    return {
        "step": step,
        "steps": config["steps"],
        "speed": speed,
        "seconds_left": left,
        "seconds_since": since,
    }


def is_training(run):
    """Say whether a run seems to be training now: not finished, and written to in the last
    minute.
    """
    return time.time() - written(run) < ALIVE and run.logged_step < run.config["steps"]


def smoothed(steps, values, window):
    """Average a curve over the points at most `window` / 2 steps away: curves logged seldom stay as
    they are. (N,) -> (N,).
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = (
        np.searchsorted(steps, steps - window / 2),
        np.searchsorted(steps, steps + window / 2, side="right"),
    )
    return (total[last] - total[first]) / (last - first)


# -- how it is drawn -------------------------------------------------------------------------------


def draw_curves(names, above, below, smooth, scale):
    """Draw two metrics of runs over their steps, thin as logged and thick as averaged; a colour a
    recipe, a dash a seed.
    """
    if not names:
        raise UserError(
            "No run is selected. Choose some in the list (with Ctrl or Shift: several), or filter "
            "less."
        )
    use_style()
    legend = 0.2 + 0.18 * math.ceil(len(names) / 2)  # its height, in inches
    height = 5.0 + legend
    fig, axes = plt.subplots(2, 1, figsize=(6.4, height))
    fig.subplots_adjust(
        left=0.08, right=0.99, bottom=0.5 / height, top=1 - (legend + 0.1) / height, hspace=0.24
    )
    recipes = [Run.open(name).config.get("recipe") for name in names]
    colours = dict(zip(dict.fromkeys(recipes), sns.color_palette("deep", len(set(recipes)))))
    for axis, metric in zip(axes, (above, below)):
        for i, (name, recipe) in enumerate(zip(names, recipes)):
            table = metrics(name)
            curve = (
                table[["step", metric]].dropna()
                if metric in table
                else pd.DataFrame({"step": [], metric: []})
            )
            style = dict(color=colours[recipe], ls=LINES[recipes[:i].count(recipe) % len(LINES)])
            axis.plot(curve["step"], curve[metric], **style, lw=0.7, alpha=0.35)
            axis.plot(curve["step"], smoothed(*curve.to_numpy().T, smooth), **style, label=name)
        axis.set(title=metric, xscale="log" if scale == "log step" else "linear")
        if scale == "log value":
            axis.set_yscale("log", nonpositive="mask")
            axis.yaxis.set_major_formatter(LogFormatter())  # 5 and not 5 x 10^0
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[1].set_xlabel("step")
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper left",
        ncols=2,
        borderaxespad=0.2,
        bbox_to_anchor=(0.05, 1),
    )
    return fig


def draw_run(name):
    """Draw all losses of a run, of training in red and of validation in black, and under them its
    newest panel of samples.
    """
    run, table = Run.open(name), metrics(name)
    losses = [
        column for column in table if column.endswith("_loss") and not column.startswith("val/")
    ]
    if not losses:
        raise UserError(f"run '{name}' has logged no losses yet.")
    use_style()
    rows, panels = math.ceil(len(losses) / 3), run.panels()
    newest = max(panels, default=0)
    columns, height = math.ceil(len(losses) / rows), 1.7 * rows + 2.4 * bool(panels)
    fig = plt.figure(figsize=(6.4, height))
    edges = dict(
        left=0.07, right=0.98, top=1 - 0.25 / height, bottom=1 - (1.7 * rows - 0.25) / height
    )
    for cell, loss in zip(
        fig.add_gridspec(rows, columns, hspace=0.5, wspace=0.35, **edges), losses
    ):
        axis = fig.add_subplot(cell, title=loss, xlim=(0, run.config["steps"]))
        axis.plot(table["step"], table[loss], color=PALETTE["GEAR"], lw=0.9)
        if f"val/{loss}" in table:
            held_out = table.dropna(subset=f"val/{loss}")
            axis.plot(
                held_out["step"],
                held_out[f"val/{loss}"],
                "o-",
                color=PALETTE["teacher"],
                ms=3,
                lw=1,
            )
    if panels:
        axis = fig.add_axes([0.01, 0, 0.98, 2.05 / height])
        axis.imshow(Image.open(panels[newest]), interpolation="antialiased")
        axis.set_axis_off()
        axis.set_title(f"step {newest}: images, reconstructions, samples")
    return fig


# -- what can be turned ----------------------------------------------------------------------------


class Compare(Panel):
    """Choose runs and compare their curves, by the controls `names`, `above`, `below`, `smooth` and
    `scale`.

    The `filters` say which runs there are to choose from: `pattern` (a shell pattern), `stage` and
    `recipe`.
    """

    def __init__(self, pattern="*", metric="val/ntp_loss", smooth=0.0):
        check_value("smooth", smooth, NonNegative)
        self.filters = {
            "pattern": widgets.Text(
                pattern, description="runs", placeholder="scenes-*-s0", continuous_update=False
            ),
            "stage": widgets.Dropdown(options=[ALL], description="stage"),
            "recipe": widgets.Dropdown(options=[ALL], description="recipe"),
        }
        controls = {
            "names": widgets.SelectMultiple(rows=9, layout={"width": "300px"}),
            "above": widgets.Dropdown(options=[metric], description="above"),
            "below": widgets.Dropdown(options=[metric.removeprefix("val/")], description="below"),
            "smooth": widgets.FloatSlider(
                smooth, max=max(100, smooth), step=5, description="smoothing", readout_format=".0f"
            ),
            "scale": widgets.Dropdown(
                options=["linear", "log step", "log value"], description="axes"
            ),
        }
        super().__init__(draw_curves, controls)
        self.place(above=self.filters.values())
        for control in self.filters.values():
            control.observe(self.list_runs, "value")
        self.list_runs()

    def list_runs(self, _=None):
        """List the runs that pass the filters, and the metrics they have; what was chosen stays
        chosen while it is there.
        """
        if self.held:
            return
        with self.at_once():
            configs = [Run.open(name).config for name in run_names()]
            for key in ("stage", "recipe"):
                _choose_from(
                    self.filters[key], [ALL, *sorted({str(config.get(key)) for config in configs})]
                )
            choices = {key: self.filters[key].value for key in ("stage", "recipe")}
            passes = lambda config: all(
                value in (ALL, str(config.get(key))) for key, value in choices.items()
            )
            options = [
                name
                for name in run_names(self.filters["pattern"].value)
                if passes(Run.open(name).config)
            ]
            names = self.controls["names"]
            chosen = [name for name in names.value if name in options]
            measured = [
                name for name in options if self.controls["above"].value in metrics(name)
            ] or options
            names.value = ()  # first: the browser would look for the old choice in the new list
            names.options = options
            names.value = chosen or measured[:SHOWN]
            logged = sorted({column for name in options for column in metrics(name)} - {"step"})
            for side in ("above", "below"):
                _choose_from(self.controls[side], logged or [self.controls[side].value])


class Follow(Panel):
    """Watch a run while it trains: while `toggle` is pressed, look again every few seconds; the
    notebook stays free.

    Where the run shown does not train and another does, that one is shown: a run follows its
    parents by itself.
    """

    def __init__(self, pattern="*"):
        self.toggle = widgets.ToggleButton(description="follow", icon="play")
        self.bar, self.status = widgets.IntProgress(description="steps"), widgets.HTML()
        self.pattern, self.task, self.drawn = pattern, None, None
        super().__init__(
            lambda name: draw_run(name or pattern), {"name": widgets.Dropdown(description="run")}
        )
        self.place(below=[self.toggle, self.bar, self.status])
        self.toggle.observe(self._switch, "value")
        self.look()

    def look(self):
        """List the runs, the one written last in front, choose one that trains, and draw what is
        new of it.
        """
        names = sorted(run_names(self.pattern), key=lambda name: -written(Run.open(name)))
        training, shown = (
            [name for name in names if is_training(Run.open(name))],
            self.controls["name"].value,
        )
        with self.at_once():
            _choose_from(
                self.controls["name"],
                names,
                shown if shown in training or not training else training[0],
            )

    def update(self, _=None):
        """Draw the run if there is news, and say how far it is."""
        if self.held or not (name := self.controls["name"].value):
            return super().update()
        run = Run.open(name)
        state = progress(run)
        self.bar.max = state["steps"]
        self.bar.value = state["step"]
        self.status.value = describe(state)
        news = (name, written(run))
        if news != self.drawn:
            self.drawn = news
            super().update()

    def _switch(self, change):
        if self.task:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self._watch()) if change.new else None

    async def _watch(self):
        """Look again and again, until cancelled."""
        while True:
            # a run has just cleared its samples, or is gone: next time
            with contextlib.suppress(FileNotFoundError, UserError):
                self.look()
            await asyncio.sleep(SECONDS)


def describe(state):
    """Say a `progress` in words."""
    is_timed = not math.isnan(state["speed"])
    speed = (
        f"{state['speed']:.0f} images/s, {_minutes(state['seconds_left'])} left, "
        if is_timed
        else ""
    )
    activity = f"{speed}last line {state['seconds_since']:.0f} s ago"
    is_finished = state["step"] >= state["steps"]
    return f"step {state['step']} of {state['steps']}: {'finished' if is_finished else activity}"


def _minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _choose_from(control, options, choice=None):
    """Give a control other options; its value becomes `choice`, or stays, or is the first,
    whichever is one of them.
    """
    value = choice or control.value
    control.options = options
    control.value = value if value in options else next(iter(options), None)
