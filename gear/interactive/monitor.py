"""The notebook `runs`: compare the curves of runs, and follow a run while it trains. No weights are
needed.
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
SHOWN = 9  # runs that are selected at first
RECENT = 20  # the last lines of timing.jsonl, from which the speed is computed
ALIVE = 60  # a run that has written nothing for so many seconds counts as stopped
SECONDS = 2.0  # between two updates while a run is followed


# -- the state of runs -----------------------------------------------------------------------------


def overview(names):
    """Return a table of runs, one row per run: stage, recipe, seed, steps, step (the last logged
    one) and weights (whether there is a checkpoint).
    """
    rows = {}
    for run in map(Run.open, names):
        settings = {key: run.config.get(key) for key in ("stage", "recipe", "seed", "steps")}
        rows[run.name] = settings | {
            "step": run.logged_step,
            "weights": bool(run.checkpoint_steps()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def differing(names):
    """Return a table of the fields in which the configurations of runs differ: one row per field
    ("objective.tau"), one column per run.
    """
    table = pd.DataFrame(
        {name: pd.Series(flatten(Run.open(name).config), dtype=object) for name in names}
    ).fillna("")
    return table[table.astype(str).nunique(axis=1) > 1]


def metrics(name):
    """Return a run's metrics; the file is read again only when it has grown."""
    path = Run.open(name).path
    file = path / "metrics.jsonl"
    return _metrics(path, file.stat().st_size if file.exists() else 0)


@functools.lru_cache(maxsize=64)
def _metrics(path, size):
    return Run.open(path.name).metrics()


def last_written(run):
    """Return the time at which a run last wrote metrics or samples, in seconds since the epoch."""
    files = [path for pattern in ("*.json*", "samples/*") for path in run.path.glob(pattern)]
    return max((path.stat().st_mtime for path in files), default=0.0)


def progress(run):
    """Return the progress of a run: {step, steps, speed, seconds_left, seconds_since}.

    `speed` is in images/s over the last lines of timing.jsonl, and `seconds_left` is computed from
    it; both are NaN for a run without timing, such as a record. `seconds_since` is the time since
    the run last wrote a file.
    """
    config = run.config
    step = run.logged_step
    columns = ["images_per_second", "seconds"]
    timing = run.metrics("timing.jsonl").reindex(columns=columns).dropna().tail(RECENT)
    speed = (
        np.average(timing["images_per_second"], weights=timing["seconds"])
        if timing["seconds"].sum() > 0
        else math.nan
    )
    return {
        "step": step,
        "steps": config["steps"],
        "speed": speed,
        "seconds_left": (config["steps"] - step) * config["batch_size"] / speed,
        "seconds_since": time.time() - last_written(run),
    }


def is_training(run):
    """Return whether a run seems to be training: it is not finished, and has written a file in the
    last minute.
    """
    return time.time() - last_written(run) < ALIVE and run.logged_step < run.config["steps"]


def smoothed(steps, values, window):
    """Average each point of a curve with the points at most `window` / 2 steps away, (N,) -> (N,).

    A curve whose points are further apart stays unchanged.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.searchsorted(steps, steps - window / 2)
    last = np.searchsorted(steps, steps + window / 2, side="right")
    return (total[last] - total[first]) / (last - first)


# -- figures ---------------------------------------------------------------------------------------


def draw_curves(names, above, below, smooth, scale):
    """Draw two metrics of runs over steps, `above` and `below`; return the figure.

    Thin lines are values as logged, thick lines are averaged by `smoothed`. There is one colour per
    recipe, and one line style per seed.
    """
    if not names:
        raise UserError(
            "No run is selected. Choose runs in the list (several with Ctrl or Shift), or relax "
            "the filters."
        )
    use_style()
    legend_height = 0.2 + 0.18 * math.ceil(len(names) / 2)  # in inches
    height = 5.0 + legend_height
    fig, axes = plt.subplots(2, 1, figsize=(6.4, height))
    fig.subplots_adjust(
        left=0.08,
        right=0.99,
        bottom=0.5 / height,
        top=1 - (legend_height + 0.1) / height,
        hspace=0.24,
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
            axis.yaxis.set_major_formatter(LogFormatter())  # writes 5 instead of 5 x 10^0
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
    """Draw all losses of a run, in training (red) and validation (black), above its newest panel of
    samples; return the figure.
    """
    run = Run.open(name)
    table = metrics(name)
    losses = [
        column for column in table if column.endswith("_loss") and not column.startswith("val/")
    ]
    if not losses:
        raise UserError(f"run '{name}' has logged no losses yet.")
    use_style()
    panels = run.panels()
    newest_step = max(panels, default=0)
    rows = math.ceil(len(losses) / 3)
    columns = math.ceil(len(losses) / rows)
    height = 1.7 * rows + 2.4 * bool(panels)
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
        axis.imshow(Image.open(panels[newest_step]), interpolation="antialiased")
        axis.set_axis_off()
        axis.set_title(f"step {newest_step}: images, reconstructions, samples")
    return fig


# -- panels with controls --------------------------------------------------------------------------


class Compare(Panel):
    """Compare the curves of runs.

    The widgets `controls` are `names` (the runs), `above` and `below` (the metrics of the upper and
    the lower plot), `smooth` (a window in steps, 0: none) and `scale` (of the axes).
    The widgets `filters` limit the list of runs: `pattern` (a shell pattern), `stage` and `recipe`.
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
        """List the runs that pass the filters, and their metrics; a choice stays as long as it is
        listed.
        """
        if self.is_held:
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
            still_chosen = [name for name in names.value if name in options]
            measured = [
                name for name in options if self.controls["above"].value in metrics(name)
            ] or options
            names.value = ()  # or the browser would look for the old choice in the new list
            names.options = options
            names.value = still_chosen or measured[:SHOWN]
            logged = sorted({column for name in options for column in metrics(name)} - {"step"})
            for side in ("above", "below"):
                _choose_from(self.controls[side], logged or [self.controls[side].value])


class Follow(Panel):
    """Follow a run while it trains: the panel is updated every few seconds while `toggle` is on.

    The notebook can be used meanwhile. If the shown run is not training and another run is, the
    panel changes to that run, for example from a parent to the run that starts after it.
    """

    def __init__(self, pattern="*"):
        self.toggle = widgets.ToggleButton(description="follow", icon="play")
        self.bar = widgets.IntProgress(description="steps")
        self.status = widgets.HTML()
        self.pattern = pattern
        self.task = None  # the asyncio task while `toggle` is on
        self.drawn_state = None  # (name, time of the last writing) in the picture
        super().__init__(
            lambda name: draw_run(name or pattern), {"name": widgets.Dropdown(description="run")}
        )
        self.place(below=[self.toggle, self.bar, self.status])
        self.toggle.observe(self._switch, "value")
        self.look()

    def look(self):
        """List the runs, the last written one first; choose one that is training, and draw it if it
        has news.
        """
        names = sorted(run_names(self.pattern), key=lambda name: -last_written(Run.open(name)))
        training = [name for name in names if is_training(Run.open(name))]
        shown = self.controls["name"].value
        choice = shown if shown in training or not training else training[0]
        with self.at_once():
            _choose_from(self.controls["name"], names, choice)

    def update(self, _=None):
        """Show the progress of the run, and draw the run if it has written a file since."""
        if self.is_held or not (name := self.controls["name"].value):
            return super().update()
        run = Run.open(name)
        state = progress(run)
        self.bar.max = state["steps"]
        self.bar.value = state["step"]
        self.status.value = describe(state)
        current_state = (name, last_written(run))
        if current_state != self.drawn_state:
            self.drawn_state = current_state
            super().update()

    def _switch(self, change):
        if self.task:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self._watch()) if change.new else None

    async def _watch(self):
        """Update the panel every `SECONDS`, until the task is cancelled."""
        while True:
            # a run may be gone, or be replacing its samples: the next update shows it
            with contextlib.suppress(FileNotFoundError, UserError):
                self.look()
            await asyncio.sleep(SECONDS)


def describe(state):
    """Describe a `progress` in words."""
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
    """Set the options of a control, and its value.

    The value becomes `choice`, or by default stays; if it is not among the options, it becomes the
    first of them.
    """
    value = choice or control.value
    control.options = options
    control.value = value if value in options else next(iter(options), None)
