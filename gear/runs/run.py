"""A run directory: configuration, metrics, checkpoints, scores, analysis tables and sample panels,
opened by name.

runs/NAME/config.json          the complete configuration, with the library version
          metrics.jsonl        one object a line, always with `step`; only values that a repetition
                               reproduces
          timing.jsonl         wall-clock figures
          checkpoints/NNNNNNN  safetensors and state.json, complete or absent
          lock                 held by the process that trains the run
          metrics.json         what `gear evaluate` measured
          analysis/TABLE.parquet
          samples/*.png
"""

import functools
import json
import math
import shutil
from pathlib import Path

import pandas as pd

from gear.config import MissingRuns, UserError, config_hash, differences, nearest
from gear.files import flush, read_json, write_atomically, write_folder_atomically
from gear.runs.folder import run_path, runs_dir
from gear.runs.listing import readable, run_names
from gear.runs.names import listed
from gear.runs.records import (
    read_config,
    read_log,
    read_scores,
    read_table,
    read_tensors,
    science,
    state_faults,
    write_parquet,
    write_tensors,
)
from gear.runs.reference import Record, reference

PANEL_WIDTH, PANEL_GAP = 12, 2  # images in a row of a sample panel, and the pixels between them


class Run:
    """One run directory. `Run.open(name)` opens an existing run, `Run.create(name, config)` makes
    one.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.name

    def __repr__(self):
        return f"Run({self.name!r}, step={self.step})"

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def open(cls, name):
        """Open the run called `name` in `runs_dir()`, or where there is none its Record.

        Raises MissingRuns with the nearest name when there is neither, and UserError for a folder
        that is no run.
        """
        run = cls(run_path(name))
        if run.exists:
            _ = run.config  # what is no run is said at once
            return run
        if name in reference().names:
            return Record(reference(), name)
        here = (
            f" What is called '{name}' here is a path: a run is opened by name."
            if Path(name).exists()
            else ""
        )
        hint = (
            f"Runs are looked for in {runs_dir()} ($GEAR_RUNS).{nearest(name, run_names())}{here}"
        )
        raise MissingRuns(f"no run '{name}'. Train it", [name], f"gear train {name}", hint)

    @classmethod
    def create(cls, name, config):
        """Make the run `name` with `config` (a dict); returns it."""
        run = cls(run_path(name))
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        write_atomically(run.path / "config.json", lambda p: p.write_text(text))
        return run

    def check_config(self, config, complete=lambda config: config):
        """Raise UserError naming the fields in which this run's configuration differs from `config`
        (a dict).

        `complete` fills in what a configuration written by an older version lacks; the version
        itself may differ.
        """
        if changed := differences(complete(science(self.config)), science(config)):
            fields = "\n  ".join(changed)
            raise UserError(
                f"run '{self.name}' exists with another configuration:\n  {fields}\n"
                f"Give the new run a name (--name), or remove {self.path}."
            )

    @property
    def exists(self):
        return (self.path / "config.json").exists()

    @functools.cached_property
    def config(self):
        """The configuration in config.json, read once: a Run does not see what replaces it."""
        try:
            return read_config(self.path / "config.json")
        except ValueError as error:
            raise UserError(
                f"{self.path / 'config.json'} cannot be read ({error}). Restore it, or if the "
                "folder is none of gear's runs, "
                f"choose another name."
            ) from None

    @property
    def config_hash(self):
        return config_hash(science(self.config))

    # -- metrics -----------------------------------------------------------------------------------

    def append(self, record, file="metrics.jsonl"):
        """Add a line to a file; raises FloatingPointError naming a value that is not finite, and
        then writes nothing.
        """
        for name, value in record.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"'{name}' is {value} at step {record['step']}")
        with open(self.path / file, "a") as out:
            out.write(json.dumps(record) + "\n")

    def metrics(self, file="metrics.jsonl"):
        """Return metrics.jsonl as a DataFrame indexed by row, sorted by `step`; several lines of
        one step are merged.
        """
        table = pd.DataFrame(self._log(file))
        return table if table.empty else table.groupby("step", as_index=False).first()

    def rewind(self, step):
        """Drop what was logged after `step`, and a line that a kill cut short: the next steps write
        it again.

        Analyses, panels of later steps and what a killed save left go with it: they belong to
        weights that will not come back.
        """
        for leftover in self.path.rglob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        shutil.rmtree(self.path / "analysis", ignore_errors=True)
        for drawn_at, panel in self.panels().items():
            if drawn_at > step:
                panel.unlink()
        for file in ("metrics.jsonl", "timing.jsonl"):
            path = self.path / file
            if path.exists():
                kept = [json.dumps(r) + "\n" for r in read_log(path)[0] if r["step"] <= step]
                write_atomically(path, lambda p, text="".join(kept): p.write_text(text))

    @property
    def logged_step(self):
        """The last step in metrics.jsonl, 0 for a new run."""
        return max((r["step"] for r in self._log("metrics.jsonl")), default=0)

    def _log(self, file):
        records, fault = read_log(self.path / file)
        if fault:
            last = f"up to step {records[-1]['step']} only" if records else "nowhere"
            steps = self.checkpoint_steps()
            raise UserError(
                f"{self.path / file} can be read "
                f"{last}{f'; the checkpoint is of step {steps[-1]}' if steps else ''}: {fault}. "
                f"Restore the file, or remove {self.path} and train again."
            )
        return records

    @property
    def step(self):
        """The step of the newest checkpoint; without weights, the last one logged."""
        steps = self.checkpoint_steps()
        return steps[-1] if steps else self.logged_step

    @property
    def is_finished(self):
        return self.config.get("steps") in self.checkpoint_steps()

    # -- checkpoints -------------------------------------------------------------------------------

    def checkpoint_steps(self):
        """Return the steps of the complete checkpoints, ascending (an interrupted save has a
        temporary name).
        """
        return sorted(
            int(p.name) for p in (self.path / "checkpoints").glob("[0-9]" * 7) if p.is_dir()
        )

    @property
    def best_step(self):
        """The step of the checkpoint with the lowest next-token loss on validation images, or
        without a generator the highest PSNR; None where none was validated.
        """
        table = self.metrics()
        metric, sign = ("val/ntp_loss", -1) if "val/ntp_loss" in table else ("val/psnr", 1)
        if metric not in table:
            return None
        validated = table[table.step.isin(self.checkpoint_steps())].dropna(subset=metric)
        return None if validated.empty else int(validated.step[(sign * validated[metric]).idxmax()])

    def save_checkpoint(self, step, tensors, state, keep=2):
        """Write {file: {name: tensor}} and the JSON `state` of `step`; keep the newest `keep`
        checkpoints, and the best.

        The folder is written under a temporary name, flushed and renamed: it is complete or absent.
        """

        def fill(temporary):
            for name, values in tensors.items():
                whole = {k: v.detach().cpu().contiguous() for k, v in values.items()}
                write_tensors(whole, temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            if (self.path / "metrics.jsonl").exists():  # never behind its checkpoint
                flush(self.path / "metrics.jsonl")

        folder = self.path / "checkpoints" / f"{step:07d}"
        write_folder_atomically(folder, fill)
        best = self.best_step
        for old in self.checkpoint_steps()[:-keep]:
            if old != best:
                shutil.rmtree(folder.with_name(f"{old:07d}"))

    def load_checkpoint(self, file, step=None):
        """Return {name: tensor} of `file` ("networks", "optimizers") at `step`, by default the
        newest.

        Raises UserError when the run has no weights or the file is truncated.
        """
        folder = self._checkpoint(step)
        try:
            return read_tensors(folder / f"{file}.safetensors")
        except Exception as error:  # safetensors raises its own Rust exception type
            raise UserError(
                f"checkpoint {folder / file}.safetensors cannot be read ({error}): it is truncated "
                "or not a checkpoint. "
                f"Remove the folder {folder} and train again: gear train {self.name} goes on from "
                "the one before it."
            ) from None

    def load_state(self, step=None):
        """Return the JSON state of `step`, by default the newest; raises UserError unless it is
        this run's and complete.
        """
        path = self._checkpoint(step) / "state.json"
        expected = {"step": int(path.parent.name), "config": self.config_hash}
        try:
            faults = state_faults(state := read_json(path), expected)
        except ValueError as error:
            faults = [str(error)]
        if faults:
            raise UserError(
                f"{path} does not fit this run ({'; '.join(faults)}). Remove the folder "
                f"{path.parent} and train again: "
                f"gear train {self.name} goes on from the one before it."
            )
        return state

    def _checkpoint(self, step):
        steps = self.checkpoint_steps()
        if not steps or (step is not None and step not in steps):
            at = "" if step is None else f" of step {step}"
            sentence = f"run '{self.name}' has no weights{at}. Train it"
            raise MissingRuns(
                sentence, [self.name], f"gear train {self.name}", f"They would lie in {self.path}."
            )
        return self.path / "checkpoints" / f"{steps[-1] if step is None else step:07d}"

    # -- what was made of the weights --------------------------------------------------------------

    def panels(self):
        """Return the sample panels, samples/NNNNNNN.png, as {step: path}."""
        return {
            int(path.stem): path
            for path in sorted((self.path / "samples").glob("[0-9]" * 7 + ".png"))
        }

    def scores(self):
        """Return the records in metrics.json, none if there is none; raises UserError for one that
        cannot be read.
        """
        return read_scores(self.path / "metrics.json")

    def table(self, name, parameters, compute):
        """Return analysis/NAME.parquet if it was made with `parameters` at this step, else
        `compute()` and keep it.

        `parameters` is a dict of JSON values; `compute` returns a DataFrame. The parameters, the
        step and the hash of the configuration travel in the file's metadata. A table that fits the
        run with other parameters is not replaced.
        """
        path = self.path / "analysis" / f"{name}.parquet"
        made_by = {"parameters": parameters, "step": self.step, "config": self.config_hash}
        found, frame = read_table(path)
        if found == made_by:
            return frame
        frame = compute()
        if found == made_by | {"parameters": found.get("parameters")}:
            return frame
        write_parquet(path, frame, made_by)
        return frame


def open_runs(pattern):
    """Open the run or record called `pattern`, or all that match the shell `pattern`.

    A list of digits such as `-s[012]` asks for each of them. Raises MissingRuns when there is none,
    and for the first of a list that is missing.
    """
    names = run_names(pattern)
    if names != [pattern]:
        names = listed(pattern) or names
    return [Run.open(name) for name in names or [pattern]]


def load_runs(pattern="*"):
    """Return the metrics of all runs that match `pattern` as one tidy DataFrame.

    Columns: run, recipe, seed, step, metric, value. Of several runs one whose log is damaged is
    left out, and named.
    """
    frames, runs = [], open_runs(pattern)
    for run in runs:
        config, table = (
            run.config,
            run.metrics() if len(runs) == 1 else readable(run.metrics, pd.DataFrame()),
        )
        if not table.empty:
            frames.append(
                table.melt("step", var_name="metric", value_name="value")
                .dropna(subset="value")
                .assign(run=run.name, recipe=config.get("recipe"), seed=config.get("seed"))
            )
    columns = ["run", "recipe", "seed", "step", "metric", "value"]
    return (
        pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    )
