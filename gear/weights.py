"""Strict loading of tensors into networks.

Errors list every tensor whose name, shape or type does not fit, or whose values are not finite.
"""

import json

import torch

from gear.config import UserError
from gear.files import write_atomically


def load_module(module, tensors, source, assign=False):
    """Load `tensors` into `module` and return the module.

    Raises UserError, as `check_fit` does, listing the tensors that do not fit.
    """
    check_fit(module, tensors, source)
    module.load_state_dict(tensors, assign=assign)
    return module


def check_fit(network, tensors, source, what=""):
    """Raise UserError unless `tensors` have the names and shapes of a network's and finite values.

    source, what: the message's words for the origin of the tensors and for the network.
    """
    what = what or type(network).__name__
    check_shapes(
        {name: tuple(t.shape) for name, t in network.state_dict().items()}, tensors, source, what
    )
    check_numbers(network, tensors, source, what)


def check_shapes(expected, tensors, source, what):
    """Raise UserError listing the tensors that are missing, unexpected or of another shape.

    expected: {name: shape}. source, what: as in `check_fit`.
    """
    if faults := mismatches(expected, {name: tuple(t.shape) for name, t in tensors.items()}):
        raise UserError(listed(f"the weights of '{source}' do not fit this {what}", faults))


def check_numbers(network, tensors, source, what):
    """Raise UserError listing the `tensors` that are not floating-point, or hold NaN or infinity.

    Tensors that are integers in the network, such as counters, may be integers here too. source,
    what: as in `check_fit`.
    """
    integers = {name for name, t in network.state_dict().items() if not t.is_floating_point()}
    if faults := odd_tensors(tensors, integers) or not_finite(tensors):
        raise UserError(
            listed(
                f"the weights of '{source}' are not all numbers that this {what} can have", faults
            )
        )


def mismatches(expected, actual):
    """List the tensors that are missing, unexpected or of another shape, one sentence per tensor.

    expected, actual: {name: shape}.
    """
    faults = [f"missing {n} {expected[n]}" for n in expected if n not in actual]
    faults += [f"unexpected {n} {actual[n]}" for n in actual if n not in expected]
    return faults + [
        f"{n} has shape {actual[n]}, expected {s}"
        for n, s in expected.items()
        if n in actual and actual[n] != s
    ]


def listed(what, faults):
    """Return a message of `what` is wrong with one line per fault, for at most twelve faults."""
    remainder = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
    return f"{what}:\n  " + "\n  ".join(faults[:12]) + remainder


def odd_tensors(tensors, integers=()):
    """List the tensors that are not dense floating-point tensors, one sentence per tensor.

    integers: names of tensors that may hold integers instead.
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
    """List the tensors that hold NaN or infinity, one sentence per tensor."""
    faults = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (values := tensor.float()).isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinity"
            count = int((~values.isfinite()).sum())
            faults.append(f"{name} holds {kind} in {count} of {values.numel()} values")
    return faults


def load_networks(run, file="networks", step=None):
    """Return the tensors of a run's checkpoint by network: {"tokenizer": {...}, ...}.

    step: that of the checkpoint, by default the newest.
    """
    return grouped(run.load_checkpoint(file, step))


def network(groups, name, source):
    """Return the tensors of the network `name` from `groups`, the result of `load_networks`.

    source: the run's name, for the message. Raises UserError if the run has no such network.
    """
    if name not in groups:
        raise UserError(
            f"run '{source}' holds no {name}: it holds {', '.join(sorted(groups)) or 'nothing'}."
        )
    return groups[name]


def grouped(tensors):
    """Group tensors by the first part of their names: {"a.b": t} becomes {"a": {"b": t}}."""
    groups = {}
    for name, tensor in tensors.items():
        group, _, short_name = name.partition(".")
        groups.setdefault(group, {})[short_name] = tensor
    return groups


# -- networks that come with the package -----------------------------------------------------------


def load_packaged(module, path, what, command):
    """Load a file of the package into `module`; return it frozen and in evaluation mode.

    Raises UserError, which names the network by `what` and the `command` that makes the file, where
    the file is missing or damaged.
    """
    # imported here because it takes a second, which listing runs can do without
    import safetensors.torch

    if not path.exists():
        raise UserError(
            f"the packaged {what} is missing ({path}). Reinstall gear, or make it: {command}"
        )
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # safetensors raises its own Rust exception type
        raise UserError(
            f"the packaged {what} {path} cannot be read ({error}). Reinstall gear, or make it: "
            f"{command}"
        ) from None
    return module.eval().requires_grad_(False)


def write_packaged(module, path, card):
    """Write a network as a file of the package and, beside it, its card as JSON.

    The card, a dict, says how the network was made: recipe, configuration hash and so on. It is
    also in the file's metadata.
    """
    import safetensors.torch

    tensors = {name: t.contiguous() for name, t in module.state_dict().items()}
    metadata = {"card": json.dumps(card, sort_keys=True)}
    text = json.dumps(card, indent=1, sort_keys=True) + "\n"
    write_atomically(
        path, lambda target: safetensors.torch.save_file(tensors, target, metadata=metadata)
    )
    write_atomically(path.with_suffix(".json"), lambda target: target.write_text(text))
