"""What the paper prints: the numbers of Tables 1 to 19, and a study's cells by our names."""

import contextlib
from pathlib import Path

import pandas as pd

from gear.config import UserError
from gear.experiments.studies import study

FILE = Path(__file__).with_name("published.csv")
COLUMNS = {  # our metric: the paper's column
    "fd": "gFID", "precision": "Prec.", "recall": "Rec.",
    "psnr": "PSNR", "ssim": "SSIM", "rfd": "rFID",
}  # fmt: skip


def published(table=None):
    """Return what the paper prints in Tables 1 to 19, one line per cell.

    Columns: table, row, column, value, unit, citation. `table` (1 to 19) keeps that one, whose
    values are floats where every one is a number; all others are text as printed, lists separated
    by "; ". Units: "" (scores, counts), dB, M (million parameters), epochs, steps, px, tokens,
    text. UserError if the paper has no such table.
    """
    lines = pd.read_csv(FILE, dtype=str, keep_default_na=False).astype({"table": int})
    if table is None:
        return lines
    lines = lines[lines.table == table].reset_index(drop=True)
    if lines.empty:
        raise UserError(f"the paper has no Table {table}: it has Tables 1 to 19.")
    with contextlib.suppress(ValueError):  # a table of configurations stays text
        lines["value"] = lines.value.astype(float)
    return lines


def printed(name, preset="scenes"):
    """Return what the paper prints of a study's cells: cell, role, metric (ours), value."""
    chosen = study(name)
    rows = []
    for cell in chosen.cells(preset):
        rows.append((cell.title, "gear", cell.published))
        if chosen.own_baseline:
            rows.append((cell.title, "baseline", cell.published.removesuffix(", +GEAR")))
    if chosen.published_baseline:
        rows.append(("LlamaGen-REPA", "baseline", chosen.published_baseline))
    table = published(chosen.table)
    columns = table.column.str.removesuffix(" w/o CFG")
    values = dict(zip(zip(table.row, columns), table.value))
    lines = [
        (title, role, metric, values[row, column])
        for title, role, row in rows
        for metric, column in COLUMNS.items()
        if (row, column) in values
    ]
    return pd.DataFrame(lines, columns=["cell", "role", "metric", "value"])
