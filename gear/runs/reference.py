"""Packs of records: a folder of few files that keeps many finished runs without their weights.

runs/reference/runs.csv         one line per run: run, preset, method, cell, seed, parent, config
                                hash
               configs.json     {run: configuration}
               metrics.parquet  content of metrics.jsonl: run, step, one column per metric
               scores.parquet   content of metrics.json: run, metric, value, interval, protocol as
                                JSON
               TABLE.parquet    one analysis: run, and the columns of its table
               samples/         RUN.STEP.png, sample panels of a few runs

The metadata of metrics.parquet list the metrics of each run. The metadata of TABLE.parquet say how
each run's table was made.
"""

import functools
import json
import math
from functools import cached_property

import pandas as pd

from gear.config import MissingRuns, UserError, config_hash
from gear.files import read_json, write_atomically
from gear.runs.folder import runs_dir
from gear.runs.names import REFERENCE
from gear.runs.records import SHEETS, Fields, read_parquet, read_sheets, science, write_parquet

METRICS = "metrics.parquet"
SCORES = "scores.parquet"


class Record:
    """One run of a pack, without weights. It has the reading methods of a Run.

    Methods that need weights raise MissingRuns.
    """

    is_finished = False  # the weights of the last step are absent, which is what Run means by it

    def __init__(self, pack, name):
        self.pack = pack
        self.name = name
        self.path = pack.folder / name  # no file exists there

    def __repr__(self):
        return f"Record({self.name!r}, step={self.step})"

    @property
    def config(self):
        return self.pack.of("configs.json", self.pack.configs, self.name)

    @property
    def config_hash(self):
        return config_hash(science(self.config))

    def metrics(self, file="metrics.jsonl"):
        """Return what the run logged, as `Run.metrics` does; timing.jsonl is not kept in a pack."""
        if file != "metrics.jsonl":
            return pd.DataFrame()
        return self.pack.of(METRICS, self.pack.metrics, self.name).copy()

    @property
    def logged_step(self):
        return int(self.metrics().step.max())

    @property
    def step(self):
        return self.logged_step

    def checkpoint_steps(self):
        return []

    def panels(self):
        """Return the sample panels in the pack as {step: path}."""
        return self.pack.panels.get(self.name, {})

    def sheets(self):
        """Return the sheets of samples in the pack, as `Run.sheets` does."""
        return read_sheets(self.pack.folder / SHEETS / self.name)

    def scores(self):
        """Return the records of evaluations, as `Run.scores` does."""
        return self.pack.scores.get(self.name, [])

    def table(self, name, parameters, compute):
        """Return the analysis `name` if it was made with `parameters`, else `compute()`.

        A computed table is not kept.
        """
        made_by, frame = self.pack.analyses.get(name, {}).get(self.name, ({}, None))
        expected = {"parameters": parameters, "step": self.step, "config": self.config_hash}
        return frame.copy() if made_by == expected else compute()

    def analyses(self):
        """Return all analyses, as `Run.analyses` does."""
        tables = self.pack.analyses
        return {name: runs[self.name] for name, runs in tables.items() if self.name in runs}

    def load_checkpoint(self, file=None, step=None):
        """Raise MissingRuns: a record has no weights."""
        sentence = f"'{self.name}' is a record without weights. Train it"
        raise MissingRuns(sentence, [self.name], f"gear train {self.name}")


class Pack:
    """The records in a folder. Each file is read at its first use; a damaged one raises UserError.

    An absent folder holds no records.
    """

    def __init__(self, folder):
        self.folder = folder

    @cached_property
    def names(self):
        read = lambda path: pd.read_csv(path, dtype=str, keep_default_na=False)["run"].tolist()
        return self._read("runs.csv", read) or []

    @cached_property
    def configs(self):
        read = lambda path: read_json(path, object_hook=lambda values: Fields(path, values))
        return self._read("configs.json", read) or {}

    @cached_property
    def metrics(self):
        return {name: table[columns] for name, (columns, table) in self._tables(METRICS).items()}

    @cached_property
    def scores(self):
        return {name: _records(table) for name, (_, table) in self._tables(SCORES).items()}

    @cached_property
    def analyses(self):
        """{analysis: {run: (made_by, DataFrame)}}; made_by says how the table was made."""
        files = {path.name for path in self.folder.glob("*.parquet")} - {METRICS, SCORES}
        return {file.removesuffix(".parquet"): self._tables(file) for file in files}

    @cached_property
    def panels(self):
        panels = {}
        for path in sorted((self.folder / "samples").glob("*.png")):
            name, _, step = path.stem.rpartition(".")
            panels.setdefault(name, {})[int(step)] = path
        return panels

    def of(self, file, values, name):
        """Return values[name]; raises UserError naming the `file` where the run is missing."""
        if name not in values:
            remedy = f"restore it (git checkout {self.folder}), or make it again (make reference)"
            raise UserError(f"{self.folder / file} holds nothing about '{name}': {remedy}.")
        return values[name]

    def _tables(self, file):
        """Return {run: (its entry in the metadata, DataFrame)} of a parquet file."""
        made_by, table = self._read(file, read_parquet) or ({}, pd.DataFrame({"run": []}))
        tables = {}
        for name, rows in table.groupby("run", sort=False):
            tables[name] = made_by.get(name), rows.drop(columns="run").reset_index(drop=True)
        return tables

    def _read(self, file, read):
        """Return `read(path)` of a file, or None if the file is absent."""
        path = self.folder / file
        try:
            return read(path) if path.exists() else None
        except Exception as error:  # a damaged file makes pyarrow and pandas raise any type
            remedy = f"restore it (git checkout {path.parent}), or make it again (make reference)"
            raise UserError(f"{path} cannot be read ({error}): {remedy}.") from None


def records(folder):
    """Return the records of the pack in `folder`, an empty list if there is none."""
    pack = Pack(folder)
    return [Record(pack, name) for name in pack.names]


def reference():
    """Return the Pack among the user's runs.

    The same object is returned, with the files it has read, until the pack is written again.
    """
    folder = runs_dir() / REFERENCE
    index = folder / "runs.csv"  # `write_pack` writes it last
    return _pack(folder, index.stat().st_mtime_ns if index.exists() else 0)


@functools.lru_cache(maxsize=4)
def _pack(folder, written_at):
    return Pack(folder)


def _records(table):
    """Convert rows of scores.parquet to records as in metrics.json."""
    records = []
    for line in table.itertuples():
        interval = {} if math.isnan(line.low) else {"interval": [line.low, line.high]}
        protocol = json.loads(line.protocol)
        records.append(
            {"metric": line.metric, "value": line.value, **interval, "protocol": protocol}
        )
    return records


# -- writing ---------------------------------------------------------------------------------------


def write_pack(folder, runs, names, with_panels=()):
    """Write the records of `runs`, a list of Run and Record, into `folder`; they replace an earlier
    pack.

    names: {run: RunName}. with_panels: the names of the runs whose sample panels are kept too;
    records bring theirs.
    Raises UserError for a folder that holds other files than a pack's.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "runs.csv").exists():
        raise UserError(
            f"{folder} holds files that are not a pack of run records: name an empty folder, or "
            "one with an earlier pack."
        )
    # everything is read before anything is removed, because records may come from this folder
    logs = {run.name: run.metrics() for run in runs}
    tables = {METRICS: {name: (log.columns.tolist(), log) for name, log in logs.items()}}
    tables[SCORES] = {run.name: ({}, _score_table(run)) for run in runs}
    for run in runs:
        for name, table in run.analyses().items():
            tables.setdefault(f"{name}.parquet", {})[run.name] = table
    pictures = {}  # path in the pack -> content
    for run in runs:
        if run.name in with_panels or isinstance(run, Record):
            for step, path in run.panels().items():
                pictures[f"samples/{run.name}.{step:07d}.png"] = path.read_bytes()
            for path in run.sheets().values():
                pictures[f"{SHEETS}/{run.name}/{path.name}"] = path.read_bytes()
    configs = {run.name: run.config for run in runs}
    index = pd.DataFrame([_index_row(run, names[run.name]) for run in runs])
    # the index first: it makes a pack
    for pattern in ("runs.csv", "*.parquet", "samples/*.png", f"{SHEETS}/*/*.png"):
        for path in folder.glob(pattern):
            path.unlink()
    for file, content in pictures.items():
        write_atomically(folder / file, lambda path, c=content: path.write_bytes(c))
    for file, tables_of_runs in tables.items():
        frames = [
            frame.assign(run=name)
            for name, (_, frame) in tables_of_runs.items()
            if frame is not None and len(frame)
        ]
        if frames:
            frame = pd.concat(frames, ignore_index=True)
            made_by = {name: made_by for name, (made_by, _) in tables_of_runs.items() if made_by}
            write_parquet(folder / file, frame[["run", *frame.columns.drop("run")]], made_by)
    text = json.dumps(configs, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / "configs.json", lambda path: path.write_text(text))
    write_atomically(folder / "runs.csv", lambda path: index.to_csv(path, index=False))


def _index_row(run, name):
    config = run.config
    return {
        "run": run.name,
        "preset": name.preset,
        "method": name.method,
        "cell": name.cell,
        "seed": config.get("seed"),
        "parent": config.get("tokenizer_run"),
        "config": run.config_hash,
    }


def _score_table(run):
    rows = []
    for record in run.scores():
        low, high = record.get("interval", (math.nan, math.nan))
        protocol = json.dumps(record["protocol"])
        rows.append((record["metric"], float(record["value"]), low, high, protocol))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "protocol"])
