"""Let torchvision import beside a CPU-only torch.

The PyPI wheel of torchvision carries operators compiled against CUDA. Beside a CPU-only torch its
library does not load. The import of torchvision then fails, because it registers fake kernels for
two operators that were never declared. Declaring their schemas is enough for transforms, datasets
and models; the compiled operators stay unavailable.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_missing_operators():
    spec = importlib.util.find_spec("torchvision")  # locates the package without importing it
    if spec is None or spec.origin is None:
        return None
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:  # the library was compiled for CUDA: declare what the import needs
            declared = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                declared.define(schema)
            return declared
    return None


_library = _declare_missing_operators()  # the declaration lives as long as this reference
