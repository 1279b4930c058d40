"""Execute notebooks with papermill: each call leaves one figure and the words that go with it.

A figure whose inputs have not changed is not drawn again.
"""

import ast
import hashlib
import json
import os
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor

from gear.config import (
    Jobs,
    MissingRuns,
    TrainingStopped,
    UserError,
    check_value,
    given_by,
    nearest,
)
from gear.experiments import published
from gear.experiments.studies import STUDIES
from gear.figures.execution import parameters_of, run_notebook
from gear.figures.parameters import check_parameter
from gear.figures.style import figure_path, kept_words, runs_of, scale
from gear.files import ROOT, check_writable, figures_dir, is_utf8, kept_json, write_atomically
from gear.runs.folder import runs_dir
from gear.runs.names import REFERENCE, SEEDS, reseeded
from gear.runs.run import Run, run_names

TYPES = {"int": int, "float": float, "bool": bool, "str": str}  # of a notebook's parameters
FOLDERS = ("start", "paper", "beyond")  # of notebooks: to begin with, the paper's, and further ones
ABLATIONS = "tab5_13_ablations"  # the notebook that draws one figure per study
INTERACTIVE = ("runs", "tour", "train")  # notebooks for interactive use: they save no figure
# drawn only when named, as the demo does: the reference records have no weights
NEEDS_WEIGHTS = (*INTERACTIVE, "probe")


class NeedsRuns(TrainingStopped):
    """A notebook stopped because runs are missing.

    The message says where; `needs` is the first line of the MissingRuns that was raised.
    """

    def __init__(self, message, needs):
        super().__init__(message)
        self.needs = needs


def notebooks():
    """Return {name: path} of the project's notebooks, in the order of their folders."""
    folders = (ROOT / "notebooks" / folder for folder in FOLDERS)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.ipynb"))}


def figure_notebooks():
    """Return the notebooks that can be drawn from records without weights."""
    return [name for name in notebooks() if name not in NEEDS_WEIGHTS]


def products():
    """Return {product: (notebook, parameters)}: each figure, `figures_dir()/PRODUCT.png`, and what
    draws it.
    """
    figures = {name: (name, {}) for name in notebooks() if name not in INTERACTIVE}
    if figures.pop(ABLATIONS, None):  # drawn once for each of the paper's studies
        for name, study in STUDIES.items():
            figures[f"tab{study.table}_{name}"] = (ABLATIONS, {"study": name})
    return figures


def names_of(product):
    """Return the names by which a product can be asked for: its own, its notebook's, its place in
    the paper ("fig5"), and what follows the place ("generator_alignment").
    """
    notebook = products().get(product, (product, {}))[0]
    kind, numbers, title = re.fullmatch(r"(?:(fig|tab)([\d_]+)_)?(.*)", product).groups()
    places = [f"{kind}{number}" for number in (numbers or "").split("_") if number]
    return {product, notebook, title, *places}


def about(product):
    """Return a product's title, place in the paper ("" for none) and claim, from the head of its
    notebook.
    """
    notebook, fixed = products()[product]
    heading, _, text = "".join(_cells(notebooks()[notebook])[0]["source"]).strip().partition("\n")
    title, place = re.fullmatch(r"# (.*?)(?: \(((?:Fig|Table)[^()]*)\))?", heading).groups()
    if study := STUDIES.get(fixed.get("study")):
        title, place = f"{title.partition(':')[0]}: {study.axis}", f"Table {study.table}"
    return {"title": title, "place": place or "", "claim": text.strip()}


def _targets(names, parameters):
    """Return {product: (notebook, all its parameters)} of `names`, which may be any of `names_of`.

    Each of several notebooks takes those of `parameters` that it has. Raises UserError for an
    unknown name, and for a parameter that none of several notebooks has.
    """
    known = products() | {name: (name, {}) for name in INTERACTIVE}
    chosen = {}
    for name in names:
        matches = {product: known[product] for product in known if name in names_of(product)}
        if not matches:
            known_names = dict.fromkeys([*notebooks(), *known])
            raise UserError(
                f"unknown notebook '{name}'.{nearest(name, known_names)} Known: "
                f"{', '.join(known_names)}."
            )
        chosen |= matches
    accepted = _accepted({notebook for notebook, _ in chosen.values()}, parameters)
    targets = {
        product: (notebook, fixed | accepted[notebook])
        for product, (notebook, fixed) in chosen.items()
        if all(parameters.get(key, value) == value for key, value in fixed.items())
    }
    if chosen and not targets:
        raise UserError(f"no figure is drawn with {parameters}. There are: {', '.join(chosen)}.")
    return targets


def _accepted(names, parameters):
    """Return {notebook: those of `parameters` that it has}.

    A single notebook gets them all, and its own check names those that it does not have.
    """
    if len(names) < 2 or not parameters:
        return dict.fromkeys(names, parameters)
    known = {name: parameters_of(notebooks()[name]) for name in names}
    for key in parameters:
        if not any(key in keys for keys in known.values()):
            raise UserError(f"none of these notebooks has a parameter '{key}'.")
    return {n: {k: v for k, v in parameters.items() if k in keys} for n, keys in known.items()}


def execute(name, parameters=None):
    """Execute a product or notebook with `parameters`; returns the path of the executed notebook.

    The executed notebook lies under `figures_dir()/executed`, and what it printed in
    data/PRODUCT.json. A value may be text, as from a command line, if it reads as the parameter's
    type. Raises UserError for an unknown name or parameter and for a value of another type, before
    anything runs; TrainingStopped, naming the cell, where a cell fails; NeedsRuns where runs are
    missing.
    """
    # papermill takes 1.4 s to import, a third of the start of gear, and a sweep starts gear often
    import papermill

    product, (notebook, parameters) = next(iter(_targets([name], parameters or {}).items()))
    source = notebooks()[notebook]
    known = parameters_of(notebooks()[notebook])
    types = {key: TYPES[value["inferred_type_name"]] for key, value in known.items()}
    parameters = {key: _typed(notebook, types, key, value) for key, value in parameters.items()}
    check_writable(figures_dir(), "GEAR_FIGURES")
    out = figures_dir() / "executed" / f"{product}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_notebook(source, out, parameters)
    except papermill.PapermillExecutionError as error:
        options = "".join(
            f", -p {key}" for key, value in parameters.items() if f"'{value}'" in error.evalue
        )
        message = (
            f"notebook '{product}', cell {error.cell_index}{options}: {error.ename}: "
            f"{error.evalue}\n "
            f" executed as {out}"
        )
        if error.ename == MissingRuns.__name__:
            needs = error.evalue.partition("\n")[0]  # the lines after it are about this machine
            _keep_words(product, known, parameters, needs=needs)
            raise NeedsRuns(message, needs) from None
        raise TrainingStopped(message) from None
    except Exception as error:  # such as a dead kernel: the other notebooks still run
        raise TrainingStopped(
            f"notebook '{product}': {type(error).__name__}: {error}\n  executed as {out}"
        ) from None
    _keep_words(product, known, parameters, _printed(out))
    return out


def _cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _printed(path):
    """Return the lines that an executed notebook printed."""
    outputs = (
        output
        for cell in _cells(path)
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    return "".join("".join(output["text"]) for output in outputs).splitlines()


def _keep_words(product, known, parameters, printed=(), needs=""):
    """Write data/PRODUCT.json: title, place in the paper, claim, parameters, printed lines.

    It holds no date and no path. `known` is papermill's description of the parameters. `needs`
    names the missing runs of a figure that could not be drawn.
    """
    if product in INTERACTIVE:
        return
    fixed = products()[product][1]
    options = [
        word
        for key, value in parameters.items()
        if key not in fixed
        for word in ("-p", key, str(value))
    ]
    words = about(product) | {
        "command": shlex.join(["gear", "figures", product, *options]),
        "parameters": {
            key: {
                "value": parameters.get(key, ast.literal_eval(value["default"])),
                "about": value["help"],
            }
            for key, value in known.items()
        },
        "said": list(printed),
        "scale": "" if needs else _scale(product),
        "needs": needs,
    }
    previous = kept_words(product)
    # an older figure stays, and so do its words
    if needs and previous and figure_path(product, "png").exists():
        is_same = previous["command"] == words["command"]
        words = previous | ({"needs": needs} if is_same else {})
    # a byte of a path that is not UTF-8 becomes JSON's escape
    text = json.dumps(words, indent=1, ensure_ascii=False) + "\n"
    path = figure_path(product, "json")
    write_atomically(
        path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace")
    )


def _scale(product):
    """Return the scale that is printed on a figure, of the runs that its CSV names; "" without
    runs.
    """
    names = runs_of(product)
    runs = [Run.open(name) for name in run_names() if name in names]
    return scale(runs) if runs else ""


def seeded(notebook, seeds):
    """Return the parameters that restrict a notebook to `seeds`: its patterns of runs, and its
    parameter `seeds`.
    """
    known = parameters_of(notebooks()[notebook])
    defaults = {key: ast.literal_eval(value["default"]) for key, value in known.items()}
    changed = {
        k: reseeded(v, seeds) for k, v in defaults.items() if isinstance(v, str) and SEEDS in v
    }
    return changed | ({"seeds": ",".join(map(str, seeds))} if "seeds" in known else {})


def check_parameters(namespace):
    """Raise UserError unless the parameters that papermill passed to a notebook are known and of
    their annotated types.

    A notebook calls this function with its `globals()`. `papermill -p` itself accepts any name and
    any value, and would ignore an unknown name silently.
    """
    types = {
        key: kind
        for key, kind in namespace.get("__annotations__", {}).items()
        if kind in TYPES.values()
    }
    injected = [
        cell for cell in namespace.get("In", []) if cell.startswith("# Parameters")
    ]  # papermill's cell
    for node in (node for cell in injected for node in ast.parse(cell).body):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            _check_known("this notebook", types, target.id)
    for key, kind in types.items():
        _check_value("this notebook", key, kind, namespace.get(key))


def _typed(notebook, types, key, value):
    """Return the value of a parameter in its type, read from text where it is text."""
    _check_known(notebook, types, key)
    kind = types[key]
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass  # stays text, which the check below reports
    _check_value(notebook, key, kind, value)
    if kind is str and not is_utf8(value):
        raise UserError(
            f"notebook '{notebook}', parameter '{key}': {value!r} is no UTF-8, the encoding of "
            "notebooks."
        )
    return value


def _check_value(notebook, key, kind, value):
    if not _is_of(value, kind):
        raise UserError(
            f"notebook '{notebook}', parameter '{key}': expected {kind.__name__}, given {value!r}."
        )
    with given_by(f"notebook '{notebook}', parameter '{key}'"):
        check_parameter(key, value)


def _check_known(notebook, types, key):
    if key not in types:
        raise UserError(
            f"notebook '{notebook}' has no parameter '{key}'.{nearest(key, types)} It has: "
            f"{', '.join(types)}."
        )


def _is_of(value, kind):
    """Return whether a value is of a type; an int is accepted as a float, a bool is not."""
    return isinstance(value, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(value, bool)
    )


def render(names=(), force=False, parameters=None, jobs=1, seeds=()):
    """Draw `names` (default: every figure that records can draw), `jobs` at a time.

    Figures whose inputs have not changed are skipped, unless `force`. `parameters` {name: value}
    and `seeds` replace the defaults of the notebooks that have them (UserError where none has). A
    notebook that fails does not stop the others; TrainingStopped at the end lists all failures.
    Missing runs are a failure only of a figure that is named; otherwise they are printed.
    """
    targets = _targets(names or figure_notebooks(), parameters or {})
    check_value("jobs", jobs, Jobs)
    if seeds:
        targets = {
            product: (notebook, seeded(notebook, seeds) | options)
            for product, (notebook, options) in targets.items()
        }
    # each thread waits for a kernel, which is a separate process
    with ThreadPoolExecutor(jobs) as pool:
        ends = list(pool.map(lambda product: _render(product, *targets[product], force), targets))
    failures = [str(end) for end in ends if end and (names or not isinstance(end, NeedsRuns))]
    if failures:
        raise TrainingStopped("\n".join(failures))


def _render(product, notebook, parameters, force):
    """Draw one figure if its inputs have changed; returns None, or the TrainingStopped that was
    raised.
    """
    stamp = figures_dir() / "executed" / f"{product}.json"
    inputs = _inputs(notebook, parameters)
    is_drawn = figure_path(product, "png").exists() or product in INTERACTIVE
    is_damaged = figure_path(product, "json").exists() and not kept_words(product)
    if not force and is_drawn and not is_damaged and kept_json(stamp) == inputs:
        print(f"{product}: up to date")
        return None
    start = time.perf_counter()
    try:
        execute(product, parameters)
    except NeedsRuns as failure:
        print(f"{product}: needs runs: {failure.needs}")
        stamp.unlink(missing_ok=True)  # the figure is drawn as soon as its runs exist
        return failure
    except TrainingStopped as failure:
        print(f"{product}: failed")
        return failure
    write_atomically(stamp, lambda path: path.write_text(json.dumps(inputs)))
    out = stamp.with_suffix(".ipynb") if product in INTERACTIVE else figure_path(product, "png")
    print(f"{product}: {time.perf_counter() - start:.0f} s, {out}", flush=True)
    return None


def _inputs(name, parameters):
    """Identify everything that a notebook's figure is made of: the notebook, its parameters, the
    code that draws, the runs.

    A file that a parameter names is identified by its size and time, a folder by its time. Analysis
    tables are left out: they follow from the runs, and drawing writes them.
    """
    digest = hashlib.sha256()
    sources = sorted((ROOT / "gear").rglob("*.py"))
    files = [f"*/{file}" for file in ("config.json", "metrics.json*", "samples/*.png")] + [
        f"{REFERENCE}/*"
    ]
    runs = [path for pattern in files for path in sorted(runs_dir().glob(pattern))]
    for path in [*filter(None, [notebooks().get(name)]), published.FILE, *sources, *runs]:
        if path.is_file():  # and not a folder among the runs that is none
            digest.update(os.fsencode("/".join(path.parts[-3:])) + path.read_bytes())
    for path in (
        os.path.expanduser(value)
        for value in parameters.values()
        if isinstance(value, str) and value
    ):
        if os.path.exists(path):
            status = os.stat(path)
            digest.update(
                os.fsencode(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}")
            )
    return {"inputs": digest.hexdigest(), "parameters": parameters}
