"""Configurations: frozen dataclasses to JSON and back, and the one exception a user's mistake raises."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import typing

__version__ = "0.1.0"


class UserError(ValueError):
    """Say what was wrong, what was expected and what to do; the command line prints it without a traceback, exit code 2."""


class TrainingStopped(RuntimeError):
    """Say why a run stopped by itself and what of it stands; printed without a traceback, exit code 1."""


class Interrupted(KeyboardInterrupt):
    """Say what stands of a run that the signal `number` ended; printed without a traceback, exit code 128 + `number`."""

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def given_by(option):
    """Name the `option` whose value a UserError is about: the library does not know how it was asked."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def nearest(name, names):
    """Phrase a suggestion for a misspelt `name` among `names`; empty when nothing is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_range(values, bound, what):
    """Raise UserError unless `values`, a tensor, holds integers in [0, bound)."""
    if values.is_floating_point() or str(values.dtype) == "torch.bool":
        raise UserError(f"{what} are {values.dtype}: integers are expected.")
    low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
    if low < 0 or high >= bound:
        raise UserError(f"{what} run from {low} to {high}: they have to lie in [0, {bound}).")


def to_dict(config):
    """Turn a (nested) dataclass into plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, values, where=""):
    """Build dataclass `cls` from `values`: a missing key takes its default, an unknown one raises UserError."""
    fields = {f.name for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"unknown field '{where}{key}' in the configuration.{nearest(key, fields)}")
    kwargs = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            value = from_dict(types[key], value, f"{where}{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[key] = value
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - kwargs.keys()):
        raise UserError(f"the configuration lacks {', '.join(where + name for name in missing)}.")
    return cls(**kwargs)


def flatten(values, prefix=""):
    """Flatten nested dicts to {"a.b": value}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old, new):
    """List the fields in which two configuration dicts differ, as 'name: old -> new' strings."""
    old, new = flatten(old), flatten(new)
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


def config_hash(values):
    """Return twelve hex digits that identify a configuration dict."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
