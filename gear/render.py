"""Execute notebooks with papermill: one call a figure, nothing repeated that is up to date."""

import hashlib
import json
import time

from gear.config import TrainingStopped, UserError, nearest
from gear.run import ROOT, figures_dir, runs_dir, write_atomically

SOURCES = ("figures.py", "run.py", "analysis")  # what a figure depends on besides its notebook and its runs
INTERACTIVE = ("runs", "tour", "train")  # notebooks to sit before: they save no figure, and the demo executes them


def notebooks():
    """Return {name: path} of the project's notebooks."""
    return {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def figure_notebooks(demo=False):
    """Return the notebooks to execute: those that draw a figure, and for the demo, which has weights, all."""
    return [name for name in notebooks() if demo or name not in INTERACTIVE]


def execute(name, parameters=None):
    """Execute the notebook `name` with `parameters`, output under `figures_dir()/executed`; returns its path.

    Raises UserError for an unknown notebook or parameter, TrainingStopped naming the cell that failed.
    """
    import papermill  # optional: training works without it

    paths = notebooks()
    if name not in paths:
        raise UserError(f"unknown notebook '{name}'.{nearest(name, paths)} Known: {', '.join(paths)}.")
    parameters = parameters or {}
    known = papermill.inspect_notebook(str(paths[name]))
    for key in parameters:
        if key not in known:
            raise UserError(f"notebook '{name}' has no parameter '{key}'.{nearest(key, known)} It has: {', '.join(known)}.")
    out = figures_dir() / "executed" / f"{name}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(paths[name]), str(out), parameters, progress_bar=False, kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        what = f"cell {error.cell_index}: {error.ename}: {error.evalue}"
        raise TrainingStopped(f"notebook '{name}', {what}\n  executed as {out}") from None
    except Exception as error:  # a kernel that died, say: the other notebooks shall still run
        raise TrainingStopped(f"notebook '{name}': {type(error).__name__}: {error}\n  executed as {out}") from None
    return out


def render(names, force=False):
    """Draw the figures of the notebooks `names`, skipping those whose inputs have not changed.

    A notebook that fails does not keep the others from running; raises TrainingStopped with all failures at the end.
    """
    failures = []
    for name in names:
        stamp = figures_dir() / "executed" / f"{name}.json"
        inputs = _inputs(name)
        drawn = (figures_dir() / f"{name}.png").exists() or name in INTERACTIVE
        if not force and drawn and stamp.exists() and json.loads(stamp.read_text()) == inputs:
            print(f"{name}: up to date")
            continue
        start = time.perf_counter()
        try:
            execute(name)
        except TrainingStopped as failure:
            failures.append(str(failure))
            print(f"{name}: failed")
            continue
        write_atomically(stamp, lambda path, text=json.dumps(inputs): path.write_text(text))
        product = stamp.with_suffix(".ipynb") if name in INTERACTIVE else f"{figures_dir() / name}.png"
        print(f"{name}: {time.perf_counter() - start:.0f} s, {product}", flush=True)
    if failures:
        raise TrainingStopped("\n".join(failures))


def _inputs(name):
    """Identify everything a notebook's figure is made of: the notebook, the code that draws, the runs.

    Not the analysis tables: they follow from the runs, and drawing writes them.
    """
    digest = hashlib.sha256()
    sources = [p for s in SOURCES for p in [ROOT / "gear" / s] for p in (sorted(p.glob("*.py")) if p.is_dir() else [p])]
    runs = [p for pattern in ("*/config.json", "*/metrics.jsonl") for p in sorted(runs_dir().glob(pattern))]
    for path in [*filter(None, [notebooks().get(name)]), *sources, *runs]:
        digest.update("/".join(path.parts[-3:]).encode() + path.read_bytes())
    return {"inputs": digest.hexdigest()}
