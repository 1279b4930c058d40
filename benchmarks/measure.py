"""Functions that the benchmarks share: timing, memory, and the peak rates of a device."""

import contextlib
import time
from pathlib import Path

import pandas as pd
import torch

from gear.cost.price import GPUS

CPU_PRODUCT, GPU_PRODUCT = 1024, 8192  # side of the square matrices whose product is timed


def card(device):
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU"
    )


def data_sheet(device):
    """Return the entry of gear.cost.price.GPUS that describes a device, or None."""
    if device.type != "cuda":
        return None
    name = card(device).lower().replace(" ", "")
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def wait(device):
    """Wait until a device has finished all work submitted to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device, repeats=5):
    """Return the seconds of each of `repeats` calls, including the work on the device."""
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def product_rate(device, dtype=torch.float32):
    """Return the FLOP/s of a large product of random matrices: the best of five calls after a first
    one.
    """
    side = GPU_PRODUCT if device.type == "cuda" else CPU_PRODUCT
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device, 6)[1:])


def copy_rate(device):
    """Return the bytes/s that a large copy reads and writes: the best of five calls after a first
    one.
    """
    count = 2**32 if device.type == "cuda" else 2**27
    source = torch.empty(count, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * count / min(seconds(lambda: target.copy_(source), device, 6)[1:])


def memory_rise(function, device):
    """Return (rise, held) of one call of `function`, in MiB: the peak above the memory held before
    the call, and the memory held before it.

    On a GPU this is the memory that torch's allocator handed out. On a CPU it is the memory of this
    process: call it in a separate process. If the operating system does not let a process reset its
    peak, the rise is an upper bound.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20, held / 2**20
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    held = resident("VmRSS")
    function()
    return resident("VmHWM") - held, held


def resident(field):
    """Return the memory of this process in MiB: held now ("VmRSS"), or at its peak ("VmHWM")."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def write_table(rows, path):
    """Write rows, one dict per row, as CSV with four digits; columns that the first row lacks come
    last.
    """
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")
