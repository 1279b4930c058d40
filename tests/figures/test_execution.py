"""Notebooks run in this interpreter, with this gear, wherever they lie and whatever else the
machine calls python3.
"""

import json
import os
import sys
from pathlib import Path

import gear
from gear.figures.execution import parameters_of, run_notebook, this_environment

SOURCES = [
    "count: int = 1  # how many",
    "import random, sys, gear\nprint(sys.executable, random.__file__, gear.__file__, count)",
]


def notebook(path):
    cells = [
        {
            "cell_type": "code",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": source,
            "id": f"c{i}",
        }
        for i, source in enumerate(SOURCES)
    ]
    cells[0]["metadata"]["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    path.write_text(
        json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})
    )


def test_the_kernel_is_this_environments(home, monkeypatch):
    """A kernel called python3 that starts nothing, a start-up file and modules of the working
    directory that end all.
    """
    data = home / "jupyter"
    (data / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (data / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(data))
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    for path in (
        startup / "00.py",
        home / "startup.py",
        home / "random.py",
        home / "gear.py",
        home / "numpy.py",
    ):
        path.write_text("import os\nos._exit(3)")
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(home / "startup.py"))
    monkeypatch.chdir(home)
    folder = Path(os.fsdecode(os.fsencode(home) + b"/a {b} [0]* # % caf\xe9"))
    folder.mkdir()
    notebook(folder / "in.ipynb")
    assert parameters_of(folder / "in.ipynb")["count"]["help"] == "how many"
    run_notebook(folder / "in.ipynb", folder / "out.ipynb", {"count": 7})
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    said = "".join(output["text"] if isinstance(output["text"], str) else "".join(output["text"])
                   for cell in cells for output in cell.get("outputs", []))  # fmt: skip
    import random

    assert said.split() == [sys.executable, random.__file__, gear.__file__, "7"]


def test_no_kernel_spec_is_looked_up():
    assert this_environment()(kernel_name="nowhere").kernel_spec.argv[:3] == [
        sys.executable,
        "-m",
        "ipykernel_launcher",
    ]
