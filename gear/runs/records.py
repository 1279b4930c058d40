"""The files of a run: how they are written, and how their content is checked when they are read.

A damaged file gives a message, never a traceback.
"""

import functools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq

from gear.config import UserError
from gear.files import is_utf8, parse_json, read_json, write_atomically

FIELDS = {  # fields of a configuration and their types
    "recipe": str,
    "stage": str,
    "teacher": str,
    "tokenizer_run": str,
    "steps": int,
    "seed": int,
    "batch_size": int,
    "eval_images": int,
    "data": dict,
    "tokenizer": dict,
    "generator": dict,
    "objective": dict,
    "optimizer": dict,
}
COUNTS = ("steps", "batch_size", "eval_images")  # fields that are at least 1


class Fields(dict):
    """An object of the JSON file `path`; reading a missing key raises UserError."""

    def __init__(self, path, values):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise UserError(
            f"{self.path} lacks '{key}': restore it, or remove the run and train it again."
        )


def read_config(path):
    """Return the configuration in config.json as Fields.

    Raises ValueError for a file that is not the configuration of a run.
    """
    config = read_json(path, object_hook=lambda values: Fields(path, values))
    if not isinstance(config, dict) or not config.keys() >= {"recipe", "steps"}:
        raise ValueError("it is not the configuration of a run, which has a recipe and steps")
    wrong_fields = {
        key: config[key]
        for key, kind in FIELDS.items()
        if key in config and not _has_type(config[key], kind)
    }
    wrong_fields |= {
        key: config[key]
        for key in COUNTS
        if key in config and key not in wrong_fields and config[key] < 1
    }
    if wrong_fields:
        listed = ", ".join(f"'{key}' is {value!r:.40}" for key, value in wrong_fields.items())
        raise ValueError(f"it is not the configuration of a run: {listed}")
    return config


def read_log(path):
    """Return (records, fault) of metrics.jsonl or timing.jsonl.

    Reading stops at the first line that is not a record, and `fault` describes it; it is "" where
    all lines are records. A damaged last line, which a kill may leave, is dropped and is no fault.
    """
    try:
        lines = (
            path.read_bytes().decode("utf-8-sig", "replace").rstrip().split("\n")
            if path.exists()
            else []
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(line))
        except ValueError as error:
            return records, "" if number == len(lines) else f"line {number} is damaged: {error}"
    return records, ""


def _record(line):
    record = parse_json(line)
    if not isinstance(record, dict) or not _has_type(record.get("step"), int):
        raise ValueError("an object with a `step` is expected")
    wrong_fields = [
        k
        for k, v in record.items()
        if not (v is None or isinstance(v, (bool, float)) or _has_type(v, int))
    ]
    if wrong_fields:
        raise ValueError(f"{wrong_fields[0]} is no number")
    return record


def state_faults(state, expected):
    """List what is wrong with the JSON `state` of a checkpoint, one sentence per fault.

    expected: {field: value}, the fields whose values are known beforehand.
    """
    if not isinstance(state, dict):
        return ["an object is expected"]
    faults = [
        f"{k} is {state.get(k, 'missing')}, not {v}"
        for k, v in expected.items()
        if state.get(k) != v
    ]
    meter = state.get("meter", {})
    for name in ("sums", "counts"):
        values = meter.get(name) if isinstance(meter, dict) else None
        if not isinstance(values, dict):
            faults.append(f"meter.{name} is {'missing' if values is None else f'{values!r:.40}'}")
        elif not all(isinstance(value, (int, float)) for value in values.values()):
            faults.append(f"meter.{name} holds a value that is no number")
    if not _has_type(state.get("skipped", 0), int):
        faults.append("skipped is no number")
    if not isinstance(state.get("classes", []), list):
        faults.append("classes is no list")
    return faults


def write_tensors(tensors, path):
    """Write {name: tensor} as a safetensors file."""
    # imported here because it takes 1 s, which listing runs or reading their metrics can do without
    import safetensors.torch

    if is_utf8(path):  # the library itself opens no other paths
        safetensors.torch.save_file(tensors, path)
    else:
        path.write_bytes(safetensors.torch.save(tensors))


def read_tensors(path):
    """Return the {name: tensor} of a safetensors file; the library's errors pass through."""
    import safetensors.torch

    return (
        safetensors.torch.load_file(path)
        if is_utf8(path)
        else safetensors.torch.load(path.read_bytes())
    )


def write_parquet(path, frame, made_by):
    """Write a DataFrame with `made_by`, a dict of JSON values that says how it was made.

    `made_by` is written to the file's metadata; see `read_parquet`.
    """
    table = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = table.schema.metadata | {b"gear": json.dumps(made_by, sort_keys=True).encode()}
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    write = functools.partial(
        pq.write_table,
        table.replace_schema_metadata(metadata),
        compression="zstd",
        use_byte_stream_split=floats,
        use_dictionary=[name for name in table.column_names if name not in floats],
        write_page_checksum=True,
    )
    write_atomically(path, write)


def read_parquet(path):
    """Return (made_by, DataFrame) of a file that `write_parquet` wrote.

    A damaged file raises an exception of any type.
    """
    table = pq.read_table(path, page_checksum_verification=True)
    return dict(json.loads(table.schema.metadata[b"gear"])), table.to_pandas()


def read_table(path):
    """Return (made_by, DataFrame) of a file that `Run.table` wrote, or ({}, None) if it is absent
    or damaged.
    """
    try:
        return read_parquet(path)
    except Exception:  # pyarrow and pandas raise any type; the table is then computed again
        return {}, None


SHEETS = "sheets"  # folder of a run or of a pack with sheets of samples


def read_sheets(folder):
    """Return the sheets of samples in a folder, STEP-SCALE.png, as {(step, cfg_scale): path}."""
    names = {path: path.stem.partition("-") for path in sorted(folder.glob("*-*.png"))}
    return {(int(step), float(scale)): path for path, (step, _, scale) in names.items()}


def science(config):
    """Return the fields of a configuration that determine results: all but the gear version."""
    return {key: value for key, value in config.items() if key != "version"}


def read_scores(path):
    """Return the records in metrics.json, an empty list if the file is absent.

    Raises UserError for a file that is damaged or holds anything else.
    """
    try:
        records = read_json(path) if path.exists() else []
        if not isinstance(records, list):
            raise ValueError("a list of records is expected")
        for i, record in enumerate(records):
            if not isinstance(record, dict) or not record.keys() >= {"metric", "value", "protocol"}:
                raise ValueError(f"record {i} has no metric, value and protocol")
            protocol = record["protocol"]
            if not (
                isinstance(record["metric"], str)
                and isinstance(protocol, dict)
                and _has_type(protocol.get("step", 0), int)
            ):
                raise ValueError(f"record {i} has a metric, a protocol or a step of another kind")
            if not (isinstance(record["value"], (int, float)) and abs(record["value"]) < math.inf):
                raise ValueError(f"the value of record {i} is no number")
        return records
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or remove it and evaluate again."
        ) from None


def _has_type(value, kind):
    """Return whether a JSON value has the type `kind`; an int must also fit into an int64 table."""
    return isinstance(value, kind) and not (
        kind is int and (isinstance(value, bool) or abs(value) >= 1 << 62)
    )
