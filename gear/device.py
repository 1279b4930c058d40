"""Devices, opened by the names that commands accept, and the seeds of their random numbers."""

import contextlib

import numpy as np
import torch

from gear.config import UserError


def find_device(name):
    """Return the torch.device called `name`: "cpu", "cuda", "cuda:1", or "auto".

    "auto" is the GPU if there is one, else the CPU. The device itself is not touched, because other
    processes may use it. Raises UserError for any other name, and for a GPU that this machine
    lacks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = {"auto": "cuda" if count else "cpu", "cpu": "cpu"} | (
        {"cuda": "cuda"} if count else {}
    )
    devices |= {f"cuda:{i}": f"cuda:{i}" for i in range(count)}
    if name not in devices:
        raise UserError(f"no device '{name}' here: there is {', '.join(devices)}.")
    return torch.device(devices[name])


def open_device(name, precision="float32"):
    """Return the device that `find_device` finds, after a test that this process can use it.

    precision: with "float32", a GPU computes in float32 throughout. With "bf16", float32
    convolutions may use TF32, and so may matrix products inside `tensor_core_products`; all other
    products stay exact, because arg-max operations depend on them. Raises UserError as
    `find_device` does, and for a device that cannot be used.
    """
    device = find_device(name)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision == "bf16"
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise UserError(
            f"device '{name}' cannot be used ({str(error).splitlines()[0]}): wait until it is "
            "free, or use cpu."
        ) from None
    return device


@contextlib.contextmanager
def tensor_core_products():
    """Allow TF32 in matrix products inside this context if convolutions may use it; see
    `open_device`.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextlib.contextmanager
def capturing(graph, device):
    """Capture the operations inside this context as a CUDA graph, on a new stream of `device`.

    If the capture fails, the process returns to its own stream and the device's default random
    generator leaves its capturing state (its seed is lost); then the error is raised again.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        device_number = torch.cuda.current_device()
        try:  # other threads may allocate memory meanwhile, which the mode "global" forbids
            capture_stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=capture_stream, capture_error_mode="thread_local"):
                yield
        except Exception:
            torch.cuda.set_stream(stream)
            fresh_state = torch.Generator(device).graphsafe_get_state()
            torch.cuda.default_generators[device_number].graphsafe_set_state(fresh_state)
            raise


def derived_seed(seed, number):
    """Return the seed of draw `number` (0, 1, 2, ...) of a run with `seed`, a hash in [0, 2^32).

    A generator on a CPU accepts 32 bits at most. Draws of different runs are unrelated. Among n
    draws of one run, about n^2 / 2^33 pairs share a seed.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
