"""Notebooks in a kernel of this environment, through papermill, wherever they lie and whatever else
is called python3.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from gear.files import child_environment

SETTINGS = (
    "--log-level=ERROR",
    "--InteractiveShellApp.ignore_cwd=True",
    "--InteractiveShellApp.exec_PYTHONSTARTUP=False",
)


def this_environment():
    """Return the manager of a kernel that is this interpreter's ipykernel.

    No kernel spec is looked up, and no module of the working directory imported.
    """
    import jupyter_client.kernelspec  # who trains needs no Jupyter

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *SETTINGS]
    spec = jupyter_client.kernelspec.KernelSpec(
        argv=command, display_name="gear", language="python"
    )

    class ThisEnvironment(jupyter_client.AsyncKernelManager):
        kernel_spec = spec

        async def start_kernel(self, **options):
            await super().start_kernel(env=child_environment(), **options)

    return ThisEnvironment


def run_notebook(source, out, parameters):
    """Execute the notebook `source` with `parameters` into `out`, as far as it comes; raises what
    papermill raises.

    This goes by way of a folder whose name is plain, because papermill fills in braces in a path
    and writes paths in UTF-8. The folder is IPython's, too: no start-up file of the user's runs.
    """
    # 1.4 s to import, a third of starting gear, which every run of a sweep would wait for
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        copy, executed = Path(folder) / ".source.ipynb", Path(folder) / out.name
        shutil.copy(source, copy)
        try:
            papermill.execute_notebook(
                _literal(copy),
                _literal(executed),
                parameters,
                progress_bar=False,
                kernel_name="python3",
                kernel_manager_class=this_environment(),
                extra_arguments=[f"--ipython-dir={folder}"],
            )
        finally:
            if executed.exists():
                shutil.move(executed, out)


def parameters_of(source):
    """Return what papermill says of a notebook's parameters: {name: {"default",
    "inferred_type_name", "help", ...}}.
    """
    import papermill  # as in `run_notebook`

    return papermill.inspect_notebook(_literal(source))


def _literal(path):
    """Spell a path for papermill, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")
