"""The devices that networks run on, by the names that a command takes; and what seeds them."""

import contextlib

import numpy as np
import torch

from gear.config import UserError


def find_device(name):
    """Return the torch.device called `name`: "cpu", "cuda", "cuda:1", or "auto", the GPU if there
    is one.

    Raises UserError for any other name, and for a GPU that is not here. The device is left alone:
    other processes may use it.
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
    """Return what `find_device` does, once this process has the device; raises UserError too where
    it cannot have it.

    With the `precision` "float32" all that a GPU computes in float32 is float32 throughout. With
    "bf16" convolutions may be TF32 there, and the products inside `tensor_core_products`; others
    stay exact, since an arg-max hangs on them.
    """
    device = find_device(name)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision == "bf16"
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise UserError(
            f"device '{name}' cannot be used ({str(error).splitlines()[0]}): wait for it, or take "
            "cpu."
        ) from None
    return device


@contextlib.contextmanager
def tensor_core_products():
    """Let float32 products on a GPU be TF32 inside, where convolutions may be: see
    `open_device`.
    """
    products = torch.backends.cuda.matmul
    exact = products.allow_tf32
    products.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        products.allow_tf32 = exact


@contextlib.contextmanager
def capturing(graph, device):
    """Capture what runs inside as a CUDA graph, on a stream of `device`, a torch.device.

    Where that fails, the error is raised again once the process is as it was: on its own stream,
    with a default generator that does not count itself as captured any more (its seed is lost).
    """
    with torch.cuda.device(device):
        stream, number = torch.cuda.current_stream(), torch.cuda.current_device()
        try:  # other threads may allocate memory meanwhile, which the mode "global" forbids
            aside = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                yield
        except Exception:
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(device).graphsafe_get_state()
            torch.cuda.default_generators[number].graphsafe_set_state(fresh)
            raise


def derived_seed(seed, number):
    """Return the seed of draw `number` (0, 1, 2, ...) of a run with `seed`: a hash of 32 bits, all
    that a CPU's generator takes.

    What one seed draws is unrelated to what another does. Of a run's own numbers, n of them, about
    n^2 / 2^33 pairs share a seed.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
