"""Notebooks through papermill, wherever they lie: it takes braces in a path for parameters, and writes paths in UTF-8."""

import shutil
import tempfile
from pathlib import Path


def run_notebook(source, out, parameters):
    """Execute the notebook `source` with `parameters` into `out`, also as far as it came; raises what papermill raises.

    It runs in `gear.kernel`, and by way of a folder whose name is plain, which is IPython's, too: no start-up file of the
    user's runs.
    """
    import papermill  # 1.4 s to import, a third of starting gear, which every run of a sweep would wait for

    with tempfile.TemporaryDirectory() as folder:
        copy, executed = Path(folder) / ".source.ipynb", Path(folder) / out.name
        shutil.copy(source, copy)
        try:
            papermill.execute_notebook(
                _literal(copy), _literal(executed), parameters, progress_bar=False, kernel_name="python3",
                kernel_manager_class="gear.kernel.ThisEnvironment", extra_arguments=[f"--ipython-dir={folder}"],
            )  # fmt: skip
        finally:
            if executed.exists():
                shutil.move(executed, out)


def parameters_of(source):
    """Return what papermill says of a notebook's parameters: {name: {"default", "inferred_type_name", "help", ...}}."""
    import papermill  # as in `run_notebook`

    return papermill.inspect_notebook(_literal(source))


def _literal(path):
    """Spell a path for papermill, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")
