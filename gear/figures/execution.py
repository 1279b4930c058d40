"""Execute notebooks with papermill, in a kernel of this Python environment.

The kernel does not depend on where a notebook lies, nor on other installed kernels named python3.
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
    """Return a kernel manager that starts this interpreter's ipykernel.

    It looks up no kernel spec and imports no module from the working directory.
    """
    import jupyter_client.kernelspec  # training does not need Jupyter

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
    """Execute the notebook `source` with `parameters`, and write it to `out`, also if a cell fails.

    Raises what papermill raises. The notebook is executed in a temporary folder, because papermill
    replaces braces in a path and writes paths in UTF-8. The folder is also IPython's, so that no
    start-up file of the user runs.
    """
    # papermill takes 1.4 s to import, a third of the start of gear, and a sweep starts gear often
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
    """Return papermill's description of a notebook's parameters: {name: {"default",
    "inferred_type_name", "help", ...}}.
    """
    import papermill  # as in `run_notebook`

    return papermill.inspect_notebook(_literal(source))


def _literal(path):
    """Escape the braces of a path, which papermill would replace."""
    return str(path).replace("{", "{{").replace("}", "}}")
