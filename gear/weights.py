"""Tensors into networks. Loading is strict: an error lists every name that does not fit, and every
value that is no number.
"""

import torch

from gear.config import UserError


def load_module(module, tensors, source, assign=False):
    """Load `tensors` into `module`, strictly; raises UserError listing the names that do not fit.
    Returns the module.
    """
    check_fit(module, tensors, source)
    module.load_state_dict(tensors, assign=assign)
    return module


def check_fit(network, tensors, source, what=""):
    """Raise UserError unless `tensors` are those of a network by name and shape, and finite
    numbers; it lists what is wrong.
    """
    what = what or type(network).__name__
    check_shapes(
        {name: tuple(t.shape) for name, t in network.state_dict().items()}, tensors, source, what
    )
    check_numbers(network, tensors, source, what)


def check_shapes(expected, tensors, source, what):
    """Raise UserError listing what is missing, unexpected or of another shape; `expected` is {name:
    shape}.
    """
    if faults := mismatches(expected, {name: tuple(t.shape) for name, t in tensors.items()}):
        raise UserError(listed(f"the weights of '{source}' do not fit this {what}", faults))


def check_numbers(network, tensors, source, what):
    """Raise UserError listing those `tensors` for a network that are no floating-point numbers, or
    hold NaN or infinity.
    """
    counts = {name for name, t in network.state_dict().items() if not t.is_floating_point()}
    if faults := odd_tensors(tensors, counts) or not_finite(tensors):
        raise UserError(
            listed(
                f"the weights of '{source}' are not all numbers that this {what} can have", faults
            )
        )


def mismatches(expected, found):
    """List what is missing, unexpected or of another shape; both are {name: shape}."""
    faults = [f"missing {n} {expected[n]}" for n in expected if n not in found]
    faults += [f"unexpected {n} {found[n]}" for n in found if n not in expected]
    return faults + [
        f"{n} has shape {found[n]}, expected {s}"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]


def listed(what, faults):
    """Phrase a list of faults, twelve at most."""
    rest = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
    return f"{what}:\n  " + "\n  ".join(faults[:12]) + rest


def odd_tensors(tensors, integers=()):
    """List the tensors that are no plain floating-point numbers; those in `integers`, names, may be
    whole numbers.
    """
    odd = []
    for name, tensor in tensors.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type == "meta"
            or tensor.is_quantized
        ):
            kind = (
                "quantised"
                if tensor.is_quantized
                else "empty (meta)"
                if tensor.is_meta
                else "sparse"
            )
            odd.append(f"{name} is {kind}, {tensor.dtype}")
        elif not (tensor.is_floating_point() or name in integers and not tensor.is_complex()):
            odd.append(f"{name} is {tensor.dtype}")
    return odd


def not_finite(tensors):
    """List the tensors that hold NaN or infinity."""
    faults = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (values := tensor.float()).isfinite().all():
            what = "NaN" if values.isnan().any() else "infinity"
            faults.append(
                f"{name} holds {what} in {int((~values.isfinite()).sum())} of {values.numel()} "
                "values"
            )
    return faults


def load_networks(run, file="networks", step=None):
    """Return a checkpoint's tensors grouped by their first name: {"tokenizer": {...},
    "tokenizer_ema": {...}, ...}.
    """
    return grouped(run.load_checkpoint(file, step))


def network(groups, name, source):
    """Return the tensors of the network `name` of a run's `load_networks`; raises UserError when it
    is not there.
    """
    if name not in groups:
        raise UserError(
            f"run '{source}' holds no {name}: it holds {', '.join(sorted(groups)) or 'nothing'}."
        )
    return groups[name]


def grouped(tensors):
    """Group {"a.b": tensor} by the first part of a name: {"a": {"b": tensor}}."""
    groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups
