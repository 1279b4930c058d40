"""Configurations: frozen dataclasses whose fields declare their ranges, to JSON and back, and what
a mistake raises.
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


class UserError(Exception):  # no ValueError: tyro would box those, and cut their lines
    """Say what was wrong, what was expected and what to do; the command line prints it without a
    traceback, exit code 2.
    """


class MissingRuns(UserError):
    """Say which `runs` are missing, or lack weights or scores, and the `command` that makes them.

    Its first line ends in the command; a `hint` that holds on this machine alone is a line of its
    own.
    """

    def __init__(self, sentence, runs, command, hint=""):
        super().__init__("\n".join(filter(None, (f"{sentence}: {command}", hint))))
        self.runs = runs
        self.command = command
        self.parts = sentence, runs, command, hint

    def __reduce__(self):
        return type(self), self.parts  # from one process to another

    @staticmethod
    def split(text):
        """Return (sentence, command) from the text of one: a notebook's kernel hands on no more."""
        sentence, _, command = text.partition("\n")[0].rpartition(": ")
        return sentence, command


class TrainingStopped(RuntimeError):
    """Say why a run stopped by itself and what of it stands; printed without a traceback, exit code
    1.
    """


class Interrupted(KeyboardInterrupt):
    """Say what stands of a run that the signal `number` ended; printed without a traceback, exit
    code 128 + `number`.
    """

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def given_by(option):
    """Name the `option` whose value a UserError is about, if any: the library does not know how it
    was asked.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from None


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


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, with both ends but the one named `without`; NaN and the
    infinities are in no range.
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


MOST = 1_000_000_000  # of whatever is counted
Count = Annotated[int, Range(1, MOST)]
Whole = Annotated[int, Range(0, MOST)]  # a count whose field says what 0 means
Samples = Annotated[int, Range(2, MOST)]  # of which statistics are taken: one has none
# scikit-learn's range; torch and NumPy take what is derived from it, too
Seed = Annotated[int, Range(0, 2**32 - 1)]
Parallel = Annotated[int, Range(0, 1_024)]  # processes or threads
Jobs = Annotated[int, Range(1, 1_024)]
Pixels = Annotated[int, Range(1, 16_384)]  # of a side
Positive = Annotated[float, Range(0, without=0)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, without=1)]
# of a soft read-out, which is hard at lower ones, where its quotients overflow
Tau = Annotated[float, Range(1e-6)]
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def check_value(name, value, kind):
    """Raise UserError unless `value` has the type `kind`: an annotation, with a Range, of choices,
    of a tuple's elements, or a number | words.

    An int will do for a float, and a bool for neither.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
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
        number, words = arguments
        check_value(name, value, words if isinstance(value, str) else number)
    elif origin is tuple:
        kinds = (
            arguments
            if arguments[-1] is not ...
            else arguments[:1] * (len(value) if isinstance(value, tuple) else 0)
        )
        if not isinstance(value, tuple) or len(value) != len(kinds):
            raise UserError(
                f"{name} is {value!r}: it has to be a tuple{f' of {len(kinds)}' if kinds else ''}."
            )
        for element, of_element in zip(value, kinds):
            check_value(name, element, of_element)
    elif (
        not isinstance(value, (int, float) if kind is float else kind)
        or isinstance(value, bool)
        and kind is not bool
    ):
        raise UserError(
            f"{name} is {value!r}: it has to be {WORDS.get(kind, f'a {kind.__name__}')}."
        )


def require(rule, message):
    """Raise UserError with `message` unless a `rule` between fields holds."""
    if not rule:
        raise UserError(message)


def read_numbers(name, text, kind):
    """Read "0,1,2" as a list of numbers of `kind`, an annotation with a Range; raises UserError for
    anything else.
    """
    number = typing.get_args(kind)[0]
    try:
        values = [number(value) for value in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} are '{text}': numbers with commas between are expected, as in 0,1,2."
        ) from None
    for value in values:
        check_value(name, value, kind)
    return values


class Checked:
    """A dataclass that checks, wherever it is built, that each field has the type and the range of
    its annotation.

    Raises UserError naming the field. A class with rules between fields adds them to
    `__post_init__`, after this one's.
    """

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            check_value(name, getattr(self, name), kind)


@functools.cache
def _kinds(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_dict(config):
    """Turn a (nested) dataclass into plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, values, where=""):
    """Build dataclass `cls` from `values`, a dict: a missing key takes its default.

    Raises UserError for an unknown key, and for a value that its field cannot have.
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
    """Flatten nested dicts to {"a.b": value}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def differences(old, new):
    """List the fields in which two configuration dicts differ, as 'name: old -> new' strings."""
    old, new = flatten(old), flatten(new)
    return [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]


def config_hash(values):
    """Return twelve hex digits that identify a configuration dict."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def changed_words(options):
    """Return the command line's words for the fields of a dataclass that differ from their
    defaults.
    """
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            name = f"--{field.name.replace('_', '-')}"
            words += [name] if value is True else [name, f"{value}"]
    return words
