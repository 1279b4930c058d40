"""gear doctor: check what works on this machine."""

import importlib
import importlib.metadata
import operator
import platform
import re
import sys
import tomllib
from pathlib import Path

from gear.cli.usage import Usage
from gear.config import UserError, __version__

PROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout
USES = {  # groups of optional packages in pyproject.toml, and what they are for
    "dev": "the tests",
    "effnet": "the teacher efficientnet-lite0 and its judge",
    "teachers": "public teachers and the CLIP score",
    "scale": "several processes and TensorBoard",
}
COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip

USAGE = Usage(
    names="",
    examples=("gear doctor",),
    details=(
        "Each line is ok, note (worth knowing), missing (optional; the line says how to get it) or "
        "broken (required). Nothing is downloaded. The exit code is 1 if something is broken."
    ),
)


def command(names, arguments):
    if names or arguments:
        raise UserError("gear doctor takes neither names nor options.")
    report = examine()
    width = max(len(name) for rows in report.values() for name, _, _ in rows)
    for title, rows in report.items():
        print(f"{title}:")
        for name, state, note in rows:
            print(f"  {state:7}  {name:{width}}  {note}")
        print()
    broken = [name for rows in report.values() for name, state, _ in rows if state == "broken"]
    if broken:
        print(f"Broken, and required: {', '.join(broken)}.")
        sys.exit(1)
    print("Nothing that is required is broken.")


def examine():
    """Return {title: [(name, state, note)]}: what was checked.

    A state is "ok", "note", "missing" (and optional) or "broken" (and required).
    """
    report = {"Python and packages": package_rows(*requirements())}
    try:
        health = importlib.import_module("gear.cli.health")  # imports torch, which may be broken
    except Exception as error:  # a library that does not load raises OSError, or its own error
        report["gear"] = [("gear", "broken", f"{__version__} cannot be imported: {error}")]
        return report
    return report | {
        "Device": health.device_rows(),
        "Weights": health.weight_rows(),
        "Folders": health.folder_rows(),
    }


def requirements():
    """Return (the range of Python, [(requirement, group)]) that this package declares.

    The group of a required package is "". A checkout's pyproject.toml goes before the metadata that
    pip installed, which may be older. Both results are empty if neither exists.
    """
    if PROJECT.exists():
        project = tomllib.loads(PROJECT.read_text())["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        pairs = [(text, group) for group, texts in groups.items() for text in texts]
        return project["requires-python"], pairs
    try:
        metadata = importlib.metadata.metadata("gear")
    except importlib.metadata.PackageNotFoundError:
        return "", []
    pairs = []
    for line in metadata.get_all("Requires-Dist") or ():
        text, _, marker = line.partition(";")
        group = re.search(r"extra == ['\"](.+?)['\"]", marker)
        pairs.append((text.strip(), group[1] if group else ""))
    return metadata["Requires-Python"], pairs


def package_rows(python, pairs):
    """Return the rows of Python and of each package that is declared; see `requirements`."""
    version = platform.python_version()
    state = "ok" if fits(version, python) else "broken"
    rows = [("python", state, f"{version}{_needs(python)}, {sys.executable}")]
    packages = {}  # a package may be declared in several groups
    for text, group in pairs:
        name, needed = re.fullmatch(r"([\w.-]+)\s*(?:\[.*?\])?\s*(.*)", text).groups()
        packages.setdefault(name, {})[group] = needed
    return rows + [_package(name, groups) for name, groups in packages.items()]


def _package(name, groups):
    """Return the row of a package; `groups` are {group: range of versions}."""
    needed = ",".join(filter(None, groups.values()))
    use = "required" if "" in groups else f"for {'; for '.join(USES.get(g, g) for g in groups)}"
    absent = "broken" if "" in groups else "missing"
    install = f"pip install '{name}{needed}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, absent, f"{use}: {install}"
    note = f"{version}{_needs(needed)}, {use}"
    if fault := _import_fault(name) if name in ("torch", "torchvision") else "":
        return name, absent, f"{note}; it cannot be imported: {fault}"
    return (name, "ok", note) if fits(version, needed) else (name, absent, f"{note}: {install}")


def fits(version, needed):
    """Tell whether a version, such as "2.13.0+cpu", is in a range, such as ">=2.11,<2.14"."""
    return all(
        COMPARISONS[comparison](_numbers(version), _numbers(bound))
        for comparison, bound in re.findall(r"([<>=]=?)\s*([\w.]+)", needed)
    )


def _numbers(version):
    """Return the first three numbers of a version, 0 for each that is missing."""
    numbers = [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])]
    return [*numbers, 0, 0, 0][:3]


def _needs(needed):
    return f" (needs {needed})" if needed else ""


def _import_fault(name):
    """Return why a package cannot be imported; "": it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a library that does not load raises OSError, or its own error
        return f"{error}".strip().partition("\n")[0] or type(error).__name__
    return ""
