"""Image sources, their splits for training and validation, and a stream that can start anywhere."""

from gear.data.report import report as data_report
from gear.data.stream import (
    DataConfig,
    Source,
    Stream,
    absolute,
    check_classes,
    load,
    loaded,
    num_classes,
    open_source,
    stream,
)
from gear.data.trained import open_trained, trained_on
from gear.images import to_float, to_uint8

__all__ = [
    "DataConfig",
    "Source",
    "Stream",
    "absolute",
    "check_classes",
    "data_report",
    "load",
    "loaded",
    "num_classes",
    "open_source",
    "open_trained",
    "stream",
    "to_float",
    "to_uint8",
    "trained_on",
]
