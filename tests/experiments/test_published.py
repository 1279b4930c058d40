"""The published numbers are complete, consistent with one another and, if the text of the paper is
on this machine, equal to the printed ones.
"""

import re
from pathlib import Path

import pytest

from gear.config import UserError
from gear.experiments.published import printed, published

PAPER = Path(__file__).parents[3] / "shared" / "reference" / "paper.md"
GENERATION = ["gFID", "sFID", "IS", "Prec.", "Rec."]
RECONSTRUCTION = ["PSNR", "SSIM", "rFID"]
# number of header lines of a table in the paper's text, if it is not one
HEADERS = {1: 2, 2: 2, 3: 3, 4: 2, 13: 2, 16: 0, 17: 0, 19: 2}
LABELS = {4: 2, 18: 3, 19: 2}  # number of cells per line that name the row, if it is not one


def values(table, row):
    """Return {column: value} of one row in a table of numbers."""
    lines = published(table)
    return dict(lines[lines.row == row][["column", "value"]].values)


def is_number(text):
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) is not None


def numbers(text):
    """List the numbers in a text as printed, in order. Trailing zeros stay; 400k becomes 400000."""
    text = re.sub(r"\$1 \\times 10\^\{(-\d+)\}\$", r"1e\1", text.replace("−", "-"))
    return re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", re.sub(r"(?<=\d)k\b", "000", text))


def test_every_table_is_there_and_every_cell_once():
    lines = published()
    assert list(lines.columns) == ["table", "row", "column", "value", "unit", "citation"]
    assert list(lines.table.unique()) == list(range(1, 20))
    assert not lines.duplicated(["table", "row", "column"]).any()
    assert set(lines.unit) == {"", "dB", "M", "epochs", "steps", "px", "tokens", "text"}
    assert ((lines.unit == "text") == ~lines.value.map(is_number)).all()
    assert all(
        re.fullmatch(rf"paper, Table {n}(, citing \[\d+])?", text)
        for n, text in zip(lines.table, lines.citation)
    )


def test_values_are_numbers_where_a_table_holds_nothing_else():
    for table in range(1, 20):
        assert (published(table).value.map(type) == (str if table in (15, 16, 17) else float)).all()
    with pytest.raises(UserError, match="no Table 20"):
        published(20)


def test_the_number_in_a_rows_name_is_its_value():
    lines = published()
    for column, pattern in (
        ("Epochs", r", (\d+) epochs"),
        ("Params", r", (\d+)M"),
        ("Steps", r", (\d+)k steps"),
    ):
        cells = lines[(lines.column == column) & (lines.table < 3)]
        assert (
            len(cells)
            and (
                cells.value == cells.row.str.extract(pattern)[0] + "000" * (column == "Steps")
            ).all()
        )


def test_table_4_prints_the_difference_of_its_columns():
    for when in ("pre", "post"):
        ours, theirs = (
            values(4, f"{method}, {when}-quantization") for method in ("GEAR", "LlamaGen-REPA")
        )
        for column, value in theirs.items():
            assert ours[column] - value == pytest.approx(
                ours[f"{column} change"], abs=1.01e-4
            )  # the paper rounds each number


@pytest.mark.parametrize(
    "cells",
    [
        [(5, "tau=0.1"), (6, "lambda=0.5"), (7, "GEAR"), (8, "VQVAE, +GEAR"), (9, "LlamaGen-REPA-L, +GEAR"),
         (12, "GEAR, w/ init."), (14, "CFG=1")],
        [(8, "VQVAE"), (9, "LlamaGen-REPA-L"), (12, "LlamaGen-REPA-L")],
        [(10, "DINOv2-B"), (11, "8th layer"), (13, "resolution 256")],
        [(10, "DINOv2-B, +GEAR"), (11, "8th layer, +GEAR"), (13, "resolution 256, +GEAR")],
    ],
    ids=["GEAR-L", "LlamaGen-REPA-L", "LlamaGen-REPA-L at 100k", "GEAR-L at 100k"],
)  # fmt: skip
def test_one_run_has_the_same_numbers_in_every_table(cells):
    runs = [
        {
            c.removesuffix(" w/o CFG"): v
            for c, v in values(*cell).items()
            if not c.endswith("w/ CFG")
        }
        for cell in cells
    ]
    assert set(runs[0]) == {*GENERATION, *RECONSTRUCTION}
    assert all(
        run == {column: runs[0][column] for column in run} and set(run) >= set(GENERATION)
        for run in runs
    )


def test_the_frozen_tokenizer_reconstructs_the_same_whatever_is_trained_on_it():
    frozen = [values(8, "VQVAE")]
    for table in (9, 10, 11):
        frozen += [
            values(table, row) for row in published(table).row.unique() if not row.endswith("+GEAR")
        ]
    assert len(frozen) == 11
    assert len({tuple(row[column] for column in RECONSTRUCTION) for row in frozen}) == 1


@pytest.mark.parametrize(
    "tokenizer,model", [("VQ-16", "VQVAE"), ("LFQ-16", "LFQ"), ("IBQ-16", "IBQ")]
)
def test_table_18_rounds_table_8(tokenizer, model):
    for row, same in (
        (f"{tokenizer}, Warm-up, bicubic", model),
        (f"{tokenizer}, GEAR, bicubic", f"{model}, +GEAR"),
    ):
        assert values(18, row) == pytest.approx(
            {c: values(8, same)[c] for c in RECONSTRUCTION}, abs=0.005001
        )


@pytest.mark.parametrize(
    "method,of_sweep",
    [("LlamaGen-REPA-1.0B", "LlamaGen-REPA, non-e2e"), ("GEAR-1.0B", "GEAR, e2e")],
)
@pytest.mark.parametrize("guidance,scale", [("w/o CFG", 1), ("w/ CFG", 16)])
def test_table_3_rounds_table_19(method, of_sweep, guidance, scale):
    for column, value in values(19, f"{of_sweep}, CFG={scale}").items():
        assert values(3, method)[f"{column} {guidance}"] == pytest.approx(value, abs=0.000501)


def test_the_configurations_agree():
    lines = published()
    shared, text = (dict(lines[lines.table == n][["row", "value"]].values) for n in (16, 17))
    both = (set(shared) & set(text)) - {"Optimizer"}  # Table 17 writes its betas beside it
    assert len(both) == 10 and all(shared[key] == text[key] for key in both)
    studies = lines[(lines.table == 15) & ~lines.column.str.endswith("default")]
    assert (studies.groupby("row").column.nunique() == 9).all()
    for study, table in (("Temp", 5), ("Coeff", 6)):
        swept = studies[
            studies.column.str.startswith(study) & studies.value.str.contains(";")
        ].value.item()
        assert [float(v) for v in swept.split("; ")] == [
            float(r.split("=")[1]) for r in published(table).row.unique()
        ]


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text")
@pytest.mark.parametrize("table", range(1, 20))
def test_every_number_stands_in_the_paper_in_this_order(table):
    parts = re.split(
        r"^\**Table (\d+) ", PAPER.read_text(), flags=re.M
    )  # a part is the text from one caption to the next
    body = [
        line.split("\t")
        for line in dict(zip(parts[1::2], parts[2::2]))[str(table)].splitlines()
        if "\t" in line
    ]
    name = slice(1, None, 2) if table in (16, 17) else slice(LABELS.get(table, 1), None)
    printed = [
        number
        for cells in body[HEADERS.get(table, 1) :]
        for cell in cells[name]
        for number in numbers(cell)
    ]
    lines = published()
    lines = lines[
        (lines.table == table) & ~lines.column.str.endswith("default")
    ]  # the paper prints a default only within the list of values
    assert [number for value in lines.value for number in numbers(value)] == printed


def test_the_papers_rows_stand_beside_their_cells():
    table = printed("tokenizer", "scenes").set_index(["cell", "role", "metric"]).value
    assert table["LFQ, tau = 0.25", "baseline", "fd"] == 18.681
    assert table["LFQ, tau = 0.25", "gear", "rfd"] == 2.129
    assert table["VQ", "gear", "psnr"] == 20.779
    shared = printed("initialisation", "scenes").set_index(["cell", "role", "metric"]).value
    assert shared["LlamaGen-REPA", "baseline", "fd"] == 14.719
    assert shared["from nothing", "gear", "fd"] == 13.435
    resolution = printed("resolution", "scenes").set_index(["cell", "role", "metric"]).value
    assert resolution["48 px", "gear", "fd"] == 18.364
