"""The kernel that executes notebooks: this interpreter and this gear, whatever else a machine calls python3."""

import sys

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from gear.home import child_environment

SETTINGS = ("--log-level=ERROR", "--InteractiveShellApp.ignore_cwd=True", "--InteractiveShellApp.exec_PYTHONSTARTUP=False")


class ThisEnvironment(AsyncKernelManager):
    """Start this interpreter's ipykernel: no kernel spec is looked up, and no module of the working directory imported."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *SETTINGS]
        return KernelSpec(argv=command, display_name="gear", language="python")

    async def start_kernel(self, **options):
        await super().start_kernel(env=child_environment(), **options)
