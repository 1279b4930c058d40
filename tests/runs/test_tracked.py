"""The tracked records suffice: every figure is drawn from runs/reference with the same bytes each
time, and a missing record is reported.
"""

import json
import shutil

import pytest

from gear.figures import figure_path, render, runs_of
from gear.figures.gallery import write_gallery
from gear.files import ROOT
from gear.runs.reference import Pack

SUFFIXES = ("png", "pdf", "csv", "json")
DRAWN = [
    p
    for p in render.products()
    if p not in render.NEEDS_WEIGHTS and (ROOT / "figures" / f"{p}.png").exists()
]


def files(folder):
    """Return the files of all figures and of the page that shows them: {path in the folder: bytes}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEAR_FIGURES", str(folder))
        paths = [figure_path(product, suffix) for product in DRAWN for suffix in SUFFIXES]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in [*paths, folder / "index.html"]
    }


def test_figures_are_tracked_with_all_their_parts(monkeypatch):
    assert len(DRAWN) >= 18, "all products but those of the studies that are not packed"
    assert len(files(ROOT / "figures")) == 4 * len(DRAWN) + 1
    monkeypatch.setenv("GEAR_FIGURES", str(ROOT / "figures"))
    records = set(Pack(ROOT / "runs" / "reference").names)
    for product in DRAWN:
        assert runs_of(product).keys() <= records, product
    assert runs_of("bridges"), "the provenance is read"


def test_the_pack_is_small():
    paths = [path for path in (ROOT / "runs" / "reference").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 3e6


@pytest.mark.slow
def test_every_product_comes_from_the_records_the_same_each_time(home, capsys):
    """First all products and the page are compared with the tracked bytes. Then one record is
    removed, and the product that needs it reports it.
    """
    shutil.copytree(ROOT / "runs" / "reference", home / "runs" / "reference")
    render.render(jobs=2)
    write_gallery()
    tracked = files(ROOT / "figures")
    redrawn = files(home / "figures")
    for name in tracked:
        assert redrawn[name] == tracked[name], name
    products = {path.stem for path in (home / "figures").glob("*.png")}
    assert products == set(DRAWN), "every figure that can be drawn is tracked"

    removed = "scenes-joint-no-init-s1"
    index = home / "runs" / "reference" / "runs.csv"
    index.write_text(
        "".join(
            line
            for line in index.read_text().splitlines(True)
            if not line.startswith(f"{removed},")
        )
    )
    capsys.readouterr()
    render.render(jobs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if removed in line]
    assert [line.partition(":")[0] for line in lines] == [
        "tab12_initialisation"
    ] and "gear sweep initialisation" in lines[0]
    assert (
        removed
        in json.loads((home / "figures" / "data" / "tab12_initialisation.json").read_text())[
            "needs"
        ]
    )
    for path in (home / "figures").glob("*.png"):
        assert path.read_bytes() == (ROOT / "figures" / path.name).read_bytes(), path.name
