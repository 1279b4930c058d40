"""Configurations and the errors that users see.

A configuration is a frozen dataclass. Its fields declare their ranges, and it converts to JSON and
back.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import sys
import typing
from typing import Annotated

__version__ = "0.1.0"


class UserError(Exception):  # not a ValueError: tyro prints those in a box and cuts their lines
    """Report a mistake that the user can correct: what was wrong, what was expected, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class MissingRuns(UserError):
    """Report `runs` that are missing or lack weights or scores, with the `command` that makes them.

    The first line of the message ends in the command. A `hint`, advice that holds on this machine
    alone, follows on a line of its own.
    """

    def __init__(self, sentence, runs, command, hint=""):
        super().__init__("\n".join(filter(None, (f"{sentence}: {command}", hint))))
        self.runs = runs
        self.command = command
        self.parts = sentence, runs, command, hint

    def __reduce__(self):
        return type(self), self.parts  # pickled when it passes from one process to another

    @staticmethod
    def split(text):
        """Return (sentence, command) from a message: a notebook's kernel passes on text alone."""
        sentence, _, command = text.partition("\n")[0].rpartition(": ")
        return sentence, command


class TrainingStopped(RuntimeError):
    """Report why a run stopped by itself and which of its results are saved.

    The command line prints the message without a traceback and exits with code 1.
    """


class Interrupted(KeyboardInterrupt):
    """Report which results are saved of a run that the signal `number` ended.

    The command line prints the message without a traceback and exits with code 128 + `number`.
    """

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def given_by(option):
    """Put the name of an `option` before the message of any UserError raised inside.

    The library knows the value at fault, and only the caller knows which option it came from. An
    empty `option` leaves the message as it is.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from None


def nearest(name, names):
    """Suggest the closest of `names` for a misspelt `name`; return "" when none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_range(values, bound, what):
    """Raise UserError unless `values`, a tensor, holds integers in [0, bound)."""
    if values.is_floating_point() or str(values.dtype) == "torch.bool":
        raise UserError(f"{what} are {values.dtype}: integers are expected.")
    low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
    if low < 0 or high >= bound:
        raise UserError(f"{what} run from {low} to {high}: they have to lie in [0, {bound}).")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both ends included except one that equals `without`.

    NaN and the infinities are in no range.
    """

    low: float
    high: float = sys.float_info.max
    without: float | None = None

    def __contains__(self, value):
        return self.low <= value <= self.high and value != self.without

    def __str__(self):
        lower = f"{'above' if self.low == self.without else 'at least'} {self.low:,}"
        upper = f" and {'below' if self.high == self.without else 'at most'} {self.high:,}"
        return lower + (upper if self.high < sys.float_info.max else "")


MOST = 1_000_000_000  # upper bound of every count
Count = Annotated[int, Range(1, MOST)]
Whole = Annotated[int, Range(0, MOST)]  # a count that may be 0; the field says what 0 means
Samples = Annotated[int, Range(2, MOST)]  # number of samples; a deviation needs at least two
# scikit-learn's range; torch and NumPy accept every seed that is derived from one in it
Seed = Annotated[int, Range(0, 2**32 - 1)]
Parallel = Annotated[int, Range(0, 1_024)]  # number of processes or threads
Jobs = Annotated[int, Range(1, 1_024)]
Pixels = Annotated[int, Range(1, 16_384)]  # length of one side
Positive = Annotated[float, Range(0, without=0)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, without=1)]
# temperature of a soft read-out; below this bound affinity / tau overflows
Tau = Annotated[float, Range(1e-6)]
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def check_value(name, value, kind):
    """Raise UserError unless `value` has the type `kind`.

    name: what the message calls the value. kind: a plain type, Annotated with a Range, a Literal, a
    tuple type, or a union of a number type and a str or Literal, the number first. An int is
    accepted as a float; a bool is accepted as neither.
    """
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is Annotated:
        check_value(name, value, arguments[0])
        for bounds in arguments[1:]:
            if isinstance(bounds, Range) and value not in bounds:
                raise UserError(
                    f"{name} is {value}: it has to be {bounds} ({WORDS[arguments[0]]})."
                )
    elif origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(map(repr, arguments))
            raise UserError(
                f"{name} is {value!r}: it has to be one of {choices}.{nearest(value, arguments)}"
            )
    elif origin is typing.Union:
        number_kind, text_kind = arguments
        check_value(name, value, text_kind if isinstance(value, str) else number_kind)
    elif origin is tuple:
        element_kinds = (
            arguments
            if arguments[-1] is not ...
            else arguments[:1] * (len(value) if isinstance(value, tuple) else 0)
        )
        if not isinstance(value, tuple) or len(value) != len(element_kinds):
            length = f" of {len(element_kinds)}" if element_kinds else ""
            raise UserError(f"{name} is {value!r}: it has to be a tuple{length}.")
        for element, element_kind in zip(value, element_kinds):
            check_value(name, element, element_kind)
    elif (
        not isinstance(value, (int, float) if kind is float else kind)
        or isinstance(value, bool)
        and kind is not bool
    ):
        raise UserError(
            f"{name} is {value!r}: it has to be {WORDS.get(kind, f'a {kind.__name__}')}."
        )


def require(rule, message):
    """Raise UserError with `message` unless `rule`, a condition on several fields, is true."""
    if not rule:
        raise UserError(message)


def read_numbers(name, text, kind):
    """Read numbers separated by commas, as in "0,1,2", and return them as a list.

    kind: the type of each number, Annotated with a Range. Raises UserError for any other text, and
    for a number outside the range.
    """
    number_type = typing.get_args(kind)[0]
    try:
        values = [number_type(value) for value in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} are '{text}': numbers separated by commas are expected, as in 0,1,2."
        ) from None
    for value in values:
        check_value(name, value, kind)
    return values


class Checked:
    """A dataclass that checks, whenever it is built, the type and the range of each field.

    Raises UserError naming the field. A subclass with rules between fields extends `__post_init__`
    and calls this one first.
    """

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            check_value(name, getattr(self, name), kind)


@functools.cache
def _kinds(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_dict(config):
    """Convert a (nested) dataclass to plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, values, where=""):
    """Build the dataclass `cls` from a dict `values`; a missing key takes the field's default.

    where: the path of `values` in the configuration ("objective."), for messages. Raises UserError
    for an unknown key, for a missing key without a default, and for a value outside its range.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where.rstrip('.') or 'the configuration'} is {values!r}: it has to be a table of "
            "fields."
        )
    fields = {f.name for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(
                f"unknown field '{where}{key}' in the configuration.{nearest(key, fields)}"
            )
    kwargs = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            value = from_dict(types[key], value, f"{where}{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[key] = value
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - kwargs.keys()):
        raise UserError(f"the configuration lacks {', '.join(where + name for name in missing)}.")
    return cls(**kwargs)


def flatten(values, prefix=""):
    """Flatten nested dicts: {"a": {"b": value}} becomes {"a.b": value}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def differences(old, new):
    """List the fields in which two configuration dicts differ, each as "name: old -> new"."""
    old = flatten(old)
    new = flatten(new)
    return [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]


def config_hash(values):
    """Return twelve hex digits that identify a configuration dict."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def changed_words(options):
    """Return the command-line flags for the fields of a dataclass that differ from their defaults,
    as a list of words.
    """
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            name = f"--{field.name.replace('_', '-')}"
            words += [name] if value is True else [name, f"{value}"]
    return words
