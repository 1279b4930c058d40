"""Run directories, opened by name: configuration, metrics, checkpoints, scores, analysis tables and
sample panels.

runs/NAME/config.json          the complete configuration, with the library version
          metrics.jsonl        one object per line, always with `step`; only values that a repeated
                               run reproduces
          timing.jsonl         wall-clock times
          checkpoints/NNNNNNN  safetensors and state.json, complete or absent
          lock                 held by the process that trains the run
          metrics.json         scores that `gear evaluate` measured
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
    SHEETS,
    read_config,
    read_log,
    read_scores,
    read_sheets,
    read_table,
    read_tensors,
    science,
    state_faults,
    write_parquet,
    write_tensors,
)
from gear.runs.reference import Record, reference

PANEL_WIDTH = 12  # images per row of a sample panel and of a sheet of samples
PANEL_GAP = 2  # pixels between the images of a sample panel


class Run:
    """One run directory: `Run.open(name)` opens an existing one, `Run.create(name, config)` makes a
    new one.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.name

    def __repr__(self):
        return f"Run({self.name!r}, step={self.step})"

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def open(cls, name):
        """Return the run called `name` in `runs_dir()`, or its Record if the run itself is absent.

        Raises MissingRuns with the nearest name if there is neither, and UserError for a folder
        that is not a run.
        """
        run = cls(run_path(name))
        if run.exists:
            _ = run.config  # raises at once for a folder that is not a run
            return run
        if name in reference().names:
            return Record(reference(), name)
        path_hint = (
            f" '{name}' in the working directory is a path: a run is opened by name."
            if Path(name).exists()
            else ""
        )
        suggestion = nearest(name, run_names())
        hint = f"Runs are looked for in {runs_dir()} ($GEAR_RUNS).{suggestion}{path_hint}"
        raise MissingRuns(f"no run '{name}'. Train it", [name], f"gear train {name}", hint)

    @classmethod
    def create(cls, name, config):
        """Write `config`, a dict, as the configuration of the run `name` and return the run."""
        run = cls(run_path(name))
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        write_atomically(run.path / "config.json", lambda p: p.write_text(text))
        return run

    def check_config(self, config, complete=lambda config: config):
        """Raise UserError naming the fields in which this run's configuration is not `config`.

        config: a dict. complete: a function that adds the fields that an older version did not
        write. The versions themselves may differ.
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
        """The configuration in config.json, read once; later changes of the file are not seen."""
        try:
            return read_config(self.path / "config.json")
        except ValueError as error:
            raise UserError(
                f"{self.path / 'config.json'} cannot be read ({error}). Restore it, or if the "
                "folder is not a run of gear, choose another name."
            ) from None

    @property
    def config_hash(self):
        return config_hash(science(self.config))

    # -- metrics -----------------------------------------------------------------------------------

    def append(self, record, file="metrics.jsonl"):
        """Append a record, {name: number} with `step`, to a log.

        Raises FloatingPointError naming a value that is not finite; nothing is then written.
        """
        for name, value in record.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"'{name}' is {value} at step {record['step']}")
        with open(self.path / file, "a") as out:
            out.write(json.dumps(record) + "\n")

    def metrics(self, file="metrics.jsonl"):
        """Return a log as a DataFrame sorted by `step`, one row per step.

        Several lines of one step are merged.
        """
        table = pd.DataFrame(self._log(file))
        return table if table.empty else table.groupby("step", as_index=False).first()

    def rewind(self, step):
        """Drop all that was logged after `step`; training from there writes it again.

        Temporary files of a killed save, analyses, and panels of later steps are removed too: they
        belong to weights that no longer exist.
        """
        for temporary in self.path.rglob(".*.tmp"):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        shutil.rmtree(self.path / "analysis", ignore_errors=True)
        for panel_step, panel in self.panels().items():
            if panel_step > step:
                panel.unlink()
        for file in ("metrics.jsonl", "timing.jsonl"):
            path = self.path / file
            if path.exists():
                records, _ = read_log(path)
                lines = [json.dumps(r) + "\n" for r in records if r["step"] <= step]
                write_atomically(path, lambda p, text="".join(lines): p.write_text(text))

    @property
    def logged_step(self):
        """The last step in metrics.jsonl, 0 for a new run."""
        return max((r["step"] for r in self._log("metrics.jsonl")), default=0)

    def _log(self, file):
        records, fault = read_log(self.path / file)
        if fault:
            extent = f"up to step {records[-1]['step']} only" if records else "nowhere"
            steps = self.checkpoint_steps()
            checkpoint = f"; the checkpoint is of step {steps[-1]}" if steps else ""
            raise UserError(
                f"{self.path / file} can be read {extent}{checkpoint}: {fault}. "
                f"Restore the file, or remove {self.path} and train again."
            )
        return records

    @property
    def step(self):
        """The step of the newest checkpoint, or without checkpoints the last logged step."""
        steps = self.checkpoint_steps()
        return steps[-1] if steps else self.logged_step

    @property
    def is_finished(self):
        return self.config.get("steps") in self.checkpoint_steps()

    # -- checkpoints -------------------------------------------------------------------------------

    def checkpoint_steps(self):
        """Return the steps of the complete checkpoints, ascending.

        An interrupted save has a temporary name and is not among them.
        """
        return sorted(
            int(p.name) for p in (self.path / "checkpoints").glob("[0-9]" * 7) if p.is_dir()
        )

    @property
    def best_step(self):
        """The step of the checkpoint that is best on validation images; None if none was validated.

        The best has the lowest next-token loss, or without a generator the highest PSNR.
        """
        table = self.metrics()
        metric, sign = ("val/ntp_loss", -1) if "val/ntp_loss" in table else ("val/psnr", 1)
        if metric not in table:
            return None
        validated = table[table.step.isin(self.checkpoint_steps())].dropna(subset=metric)
        return None if validated.empty else int(validated.step[(sign * validated[metric]).idxmax()])

    def save_checkpoint(self, step, tensors, state, keep=2):
        """Write the checkpoint of `step`, and remove all but the newest `keep` and the best one.

        tensors: {file: {name: tensor}}. state: a dict of JSON values. The folder is written under a
        temporary name, flushed and renamed: it is complete or absent.
        """

        def fill(temporary):
            for name, values in tensors.items():
                on_cpu = {k: v.detach().cpu().contiguous() for k, v in values.items()}
                write_tensors(on_cpu, temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            if (self.path / "metrics.jsonl").exists():  # the log must not end before the checkpoint
                flush(self.path / "metrics.jsonl")

        folder = self.path / "checkpoints" / f"{step:07d}"
        write_folder_atomically(folder, fill)
        best = self.best_step
        for old in self.checkpoint_steps()[:-keep]:
            if old != best:
                shutil.rmtree(folder.with_name(f"{old:07d}"))

    def load_checkpoint(self, file, step=None):
        """Return {name: tensor} of a file ("networks", "optimizers") of the checkpoint of `step`.

        step: by default the newest. Raises MissingRuns if the run has no such checkpoint, and
        UserError if the file is damaged.
        """
        folder = self._checkpoint(step)
        try:
            return read_tensors(folder / f"{file}.safetensors")
        except Exception as error:  # safetensors raises its own Rust exception type
            raise UserError(
                f"checkpoint {folder / file}.safetensors cannot be read ({error}): it is truncated "
                f"or not a checkpoint. Remove the folder {folder} and train again: "
                f"gear train {self.name} goes on from the checkpoint before it."
            ) from None

    def load_state(self, step=None):
        """Return the JSON state of the checkpoint of `step`, by default the newest.

        Raises MissingRuns if the run has no such checkpoint, and UserError if the state is damaged
        or belongs to another run.
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
                f"gear train {self.name} goes on from the checkpoint before it."
            )
        return state

    def _checkpoint(self, step):
        steps = self.checkpoint_steps()
        if step is not None and steps and step not in steps:
            raise UserError(
                f"run '{self.name}' has no checkpoint of step {step}: it has those of "
                f"{', '.join(map(str, steps))}."
            )
        if not steps:
            sentence = f"run '{self.name}' has no weights. Train it"
            raise MissingRuns(
                sentence, [self.name], f"gear train {self.name}", f"They would lie in {self.path}."
            )
        return self.path / "checkpoints" / f"{steps[-1] if step is None else step:07d}"

    # -- samples, scores and analyses --------------------------------------------------------------

    def panels(self):
        """Return the sample panels, samples/NNNNNNN.png, as {step: path}."""
        return {
            int(path.stem): path
            for path in sorted((self.path / "samples").glob("[0-9]" * 7 + ".png"))
        }

    def sheets(self):
        """Return the sheets of samples that `gear evaluate` kept, as {(step, cfg_scale): path}."""
        return read_sheets(self.path / SHEETS)

    def scores(self):
        """Return the records in metrics.json, an empty list if the file is absent.

        Raises UserError for a damaged file.
        """
        return read_scores(self.path / "metrics.json")

    def table(self, name, parameters, compute):
        """Return analysis/NAME.parquet if it was made with `parameters` at this step, else
        `compute()`.

        parameters: a dict of JSON values. compute: a function that returns a DataFrame. A computed
        table is written, with the parameters, the step and the hash of the configuration in the
        file's metadata; it does not replace a table of this step with other parameters.
        """
        path = self.path / "analysis" / f"{name}.parquet"
        made_by = {"parameters": parameters, "step": self.step, "config": self.config_hash}
        stored_made_by, frame = read_table(path)
        if stored_made_by == made_by:
            return frame
        frame = compute()
        if stored_made_by == made_by | {"parameters": stored_made_by.get("parameters")}:
            return frame
        write_parquet(path, frame, made_by)
        return frame

    def analyses(self):
        """Return all analyses that are kept: {name: (made_by, DataFrame)}, see `table`; the
        DataFrame of a damaged file is None.
        """
        paths = sorted((self.path / "analysis").glob("*.parquet"))
        return {path.stem: read_table(path) for path in paths}


def open_runs(pattern):
    """Return the runs or records that match a shell `pattern`, or the one of that name.

    A list of digits such as `-s[012]` requires a run for every digit. Raises MissingRuns if no run
    matches, and for the first missing run of a list.
    """
    names = run_names(pattern)
    if names != [pattern]:
        names = listed(pattern) or names
    return [Run.open(name) for name in names or [pattern]]


def load_runs(pattern="*"):
    """Return the metrics of all runs that match `pattern` as one tidy DataFrame.

    Columns: run, recipe, seed, step, metric, value. If several runs match, those with a damaged log
    are left out and reported on stderr.
    """
    frames = []
    runs = open_runs(pattern)
    for run in runs:
        config = run.config
        table = run.metrics() if len(runs) == 1 else readable(run.metrics, pd.DataFrame())
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
