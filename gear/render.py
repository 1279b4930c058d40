"""Execute notebooks with papermill: one call a figure, nothing repeated that is up to date."""

import ast
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

from gear.config import TrainingStopped, UserError, nearest
from gear.home import ROOT, check_writable, figures_dir, runs_dir, write_atomically

TYPES = {"int": int, "float": float, "bool": bool, "str": str}  # of a notebook's parameters
INTERACTIVE = ("runs", "tour", "train")  # notebooks to sit before: they save no figure
NEEDS_WEIGHTS = (*INTERACTIVE, "probe")  # the demo executes them: tracked runs come without


def notebooks():
    """Return {name: path} of the project's notebooks."""
    return {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def figure_notebooks(demo=False):
    """Return the notebooks to execute: those that draw a figure, and for the demo, which has weights, all."""
    return [name for name in notebooks() if demo or name not in NEEDS_WEIGHTS]


def execute(name, parameters=None):
    """Execute the notebook `name` with `parameters`, output under `figures_dir()/executed`; returns its path.

    A value may be text, as from a command line, if it reads as the parameter's type. Raises UserError for an unknown notebook
    or parameter and for a value of another type, before anything runs; TrainingStopped naming the cell that failed.
    """
    import papermill  # optional: training works without it

    paths = notebooks()
    if name not in paths:
        raise UserError(f"unknown notebook '{name}'.{nearest(name, paths)} Known: {', '.join(paths)}.")
    known = papermill.inspect_notebook(str(paths[name]))
    types = {key: TYPES[value["inferred_type_name"]] for key, value in known.items()}
    parameters = {key: _typed(name, types, key, value) for key, value in (parameters or {}).items()}
    check_writable(figures_dir(), "GEAR_FIGURES")
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


def check_parameters(namespace):
    """Raise UserError unless the parameters that papermill gave a notebook are its own and of their annotated types.

    A notebook calls it with its `globals()`: `papermill -p` itself takes any name and any value, and a name that is no
    parameter would leave the default in force without a word.
    """
    types = {key: kind for key, kind in namespace.get("__annotations__", {}).items() if kind in TYPES.values()}
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters")]  # papermill's cell
    for node in (node for cell in injected for node in ast.parse(cell).body):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            _check_known("this notebook", types, target.id)
    for key, kind in types.items():
        if not _is_of(namespace.get(key), kind):
            raise _mistyped("this notebook", key, kind, namespace.get(key))


def _typed(notebook, types, key, value):
    """Return the value of a parameter in its type, read from text where it is text."""
    _check_known(notebook, types, key)
    kind = types[key]
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass  # still text, and said to be
    if not _is_of(value, kind):
        raise _mistyped(notebook, key, kind, value)
    return value


def _check_known(notebook, types, key):
    if key not in types:
        raise UserError(f"notebook '{notebook}' has no parameter '{key}'.{nearest(key, types)} It has: {', '.join(types)}.")


def _is_of(value, kind):
    """An int will do for a float; a bool is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _mistyped(notebook, key, kind, value):
    return UserError(f"notebook '{notebook}', parameter '{key}': expected {kind.__name__}, given {value!r}.")


def render(names, force=False, parameters=None, jobs=1):
    """Draw the figures of the notebooks `names`, `jobs` at a time, skipping those whose inputs have not changed.

    `parameters` {name: value} take the place of one notebook's defaults; UserError where several notebooks are named.
    A notebook that fails does not keep the others from running; raises TrainingStopped with all failures at the end.
    """
    if parameters and len(names) != 1:
        raise UserError("parameters are those of one notebook: gear figures NOTEBOOK -p KEY VALUE.")
    if jobs < 1:
        raise UserError(f"{jobs} notebooks at a time is none: --jobs has to be at least 1.")
    with ThreadPoolExecutor(jobs) as pool:  # a kernel is a process of its own; the threads wait for theirs
        failures = list(filter(None, pool.map(lambda name: _render(name, force, parameters), names)))
    if failures:
        raise TrainingStopped("\n".join(failures))


def _render(name, force, parameters):
    """Draw one notebook's figure if its inputs have changed; returns None, or how it failed."""
    stamp = figures_dir() / "executed" / f"{name}.json"
    inputs = _inputs(name, parameters or {})
    drawn = (figures_dir() / f"{name}.png").exists() or name in INTERACTIVE
    if not force and drawn and stamp.exists() and json.loads(stamp.read_text()) == inputs:
        print(f"{name}: up to date")
        return None
    start = time.perf_counter()
    try:
        execute(name, parameters)
    except TrainingStopped as failure:
        print(f"{name}: failed")
        return str(failure)
    write_atomically(stamp, lambda path: path.write_text(json.dumps(inputs)))
    product = stamp.with_suffix(".ipynb") if name in INTERACTIVE else f"{figures_dir() / name}.png"
    print(f"{name}: {time.perf_counter() - start:.0f} s, {product}", flush=True)
    return None


def _inputs(name, parameters):
    """Identify everything a notebook's figure is made of: the notebook, its parameters, the code that draws, the runs.

    Of a file that a parameter names, size and time stand for its content, and a folder's own time for what it holds. Not the
    analysis tables: they follow from the runs, and drawing writes them.
    """
    digest = hashlib.sha256()
    sources = sorted((ROOT / "gear").rglob("*.py"))
    runs = [p for pattern in ("*/config.json", "*/metrics.jsonl", "*/samples/*.png") for p in sorted(runs_dir().glob(pattern))]
    for path in [*filter(None, [notebooks().get(name)]), *sources, *runs]:
        digest.update("/".join(path.parts[-3:]).encode() + path.read_bytes())
    for path in (os.path.expanduser(value) for value in parameters.values() if isinstance(value, str) and value):
        if os.path.exists(path):
            there = os.stat(path)
            digest.update(f"{os.path.abspath(path)} {there.st_size} {there.st_mtime_ns}".encode())
    return {"inputs": digest.hexdigest(), "parameters": parameters}
