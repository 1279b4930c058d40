"""A run's own files, held against what a run writes when they are read: a damaged one is a message,
never a traceback.
"""

import functools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq

from gear.config import UserError
from gear.files import is_utf8, parse_json, read_json, write_atomically

FIELDS = {  # of a configuration, and what they are
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
COUNTS = ("steps", "batch_size", "eval_images")  # one at least of each


class Fields(dict):
    """A JSON object of the file `path`: a key that is missing raises UserError."""

    def __init__(self, path, values):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise UserError(
            f"{self.path} lacks '{key}': restore it, or remove the run and train it again."
        )


def read_config(path):
    """Return the configuration in config.json as Fields; raises ValueError for what is none."""
    config = read_json(path, object_hook=lambda values: Fields(path, values))
    if not isinstance(config, dict) or not config.keys() >= {"recipe", "steps"}:
        raise ValueError("it is not the configuration of a run, which has a recipe and steps")
    wrong = {
        key: config[key]
        for key, kind in FIELDS.items()
        if key in config and not _is_of(config[key], kind)
    }
    wrong |= {
        key: config[key] for key in COUNTS if key in config and key not in wrong and config[key] < 1
    }
    if wrong:
        listed = ", ".join(f"'{key}' is {value!r:.40}" for key, value in wrong.items())
        raise ValueError(f"it is not the configuration of a run: {listed}")
    return config


def read_log(path):
    """Return the records of metrics.jsonl or timing.jsonl, and what is wrong with the first line
    that is none, or "".

    A last line that a kill cut short is left out; nothing is wrong with that.
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
    if not isinstance(record, dict) or not _is_of(record.get("step"), int):
        raise ValueError("an object with a `step` is expected")
    wrong = [
        k
        for k, v in record.items()
        if not (v is None or isinstance(v, (bool, float)) or _is_of(v, int))
    ]
    if wrong:
        raise ValueError(f"{wrong[0]} is no number")
    return record


def state_faults(state, expected):
    """List what is wrong with the JSON state of a checkpoint, of which the fields in `expected` are
    known.
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
            faults.append(f"meter.{name} holds what is no number")
    if not _is_of(state.get("skipped", 0), int) or not isinstance(state.get("classes", []), list):
        faults.append("skipped and classes are no number and no list")
    return faults


def write_tensors(tensors, path):
    """Write {name: tensor} as a safetensors file; the library itself opens paths in UTF-8 alone."""
    # 1 s, for which one who lists runs or reads their metrics does not wait
    import safetensors.torch

    if is_utf8(path):
        safetensors.torch.save_file(tensors, path)
    else:
        path.write_bytes(safetensors.torch.save(tensors))


def read_tensors(path):
    """Return the {name: tensor} of a safetensors file; raises what the library raises."""
    import safetensors.torch

    return (
        safetensors.torch.load_file(path)
        if is_utf8(path)
        else safetensors.torch.load(path.read_bytes())
    )


def write_parquet(path, frame, made_by):
    """Write a DataFrame with `made_by`, a dict of JSON values, in the file's metadata; see
    `read_parquet`.
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
    """Return (made by, DataFrame) of a file that `write_parquet` wrote; raises whatever the damage
    brings about.
    """
    table = pq.read_table(path, page_checksum_verification=True)
    return dict(json.loads(table.schema.metadata[b"gear"])), table.to_pandas()


def read_table(path):
    """Return (made by, table) of a parquet file that `Run.table` kept, or ({}, None) where it is
    absent or damaged.
    """
    try:
        return read_parquet(path)
    except Exception:  # pyarrow and pandas raise what they like; the table is then computed again
        return {}, None


def science(config):
    """Return what of a configuration says what was computed: all but the library's version."""
    return {key: value for key, value in config.items() if key != "version"}


def read_scores(path):
    """Return the records in metrics.json, none if there is none; raises UserError for what is
    none.
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
                and _is_of(protocol.get("step", 0), int)
            ):
                raise ValueError(f"record {i} has a metric, a protocol or a step of another kind")
            if not (isinstance(record["value"], (int, float)) and abs(record["value"]) < math.inf):
                raise ValueError(f"the value of record {i} is no number")
        return records
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or remove it and evaluate again."
        ) from None


def _is_of(value, kind):
    """Say whether a JSON value is of a kind; a whole number is one that a table of numbers can
    hold.
    """
    return isinstance(value, kind) and not (
        kind is int and (isinstance(value, bool) or abs(value) >= 1 << 62)
    )
