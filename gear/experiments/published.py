"""The numbers of the paper's Tables 1 to 19, and those of a study under our names."""

import contextlib
from pathlib import Path

import pandas as pd

from gear.config import UserError
from gear.experiments.studies import study

FILE = Path(__file__).with_name("published.csv")
COLUMNS = {  # our name of a metric: the column in the paper
    "fd": "gFID", "precision": "Prec.", "recall": "Rec.",
    "psnr": "PSNR", "ssim": "SSIM", "rfd": "rFID",
}  # fmt: skip


def published(table=None):
    """Return the entries of the paper's Tables 1 to 19, one row per entry.

    Columns: table, row, column, value, unit, citation. With `table` (1 to 19), only the entries of
    that table. Values are text as printed, lists separated by "; "; the values of a single `table`
    are floats if all of them are numbers. Units: "" (scores, counts), dB, M (million parameters),
    epochs, steps, px, tokens, text. Raises UserError if the paper has no such table.
    """
    lines = pd.read_csv(FILE, dtype=str, keep_default_na=False).astype({"table": int})
    if table is None:
        return lines
    lines = lines[lines.table == table].reset_index(drop=True)
    if lines.empty:
        raise UserError(f"the paper has no Table {table}: it has Tables 1 to 19.")
    with contextlib.suppress(ValueError):  # tables of configurations hold words: they stay text
        lines["value"] = lines.value.astype(float)
    return lines


def printed(name, preset="scenes"):
    """Return the paper's values for the cells of a study.

    Columns: cell (its title), role ("gear" or "baseline"), metric (our name), value.
    """
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
