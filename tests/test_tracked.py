"""What is tracked is enough: every product comes from runs/, the same bytes each time, and misses what is missing."""

import json

import pytest

from gear.figures import render
from gear.figures.gallery import write_gallery
from gear.files import ROOT

SUFFIXES = ("png", "pdf", "csv", "json")
DRAWN = [p for p in render.products() if p not in render.NEEDS_WEIGHTS and (ROOT / "figures" / f"{p}.png").exists()]


@pytest.fixture
def linked(home):
    """The tracked runs, as links in the test's own folder; returns that."""
    (home / "runs").mkdir()
    for path in (ROOT / "runs").iterdir():
        if (path / "config.json").exists() and path.name.startswith("scenes-"):
            (home / "runs" / path.name).symlink_to(path)
    return home / "runs"


def test_figures_are_tracked_with_all_their_parts():
    assert len(DRAWN) >= 18, "all products but those of studies that nobody has run here"
    for product in DRAWN:
        assert all((ROOT / "figures" / f"{product}.{suffix}").exists() for suffix in SUFFIXES), product
        head = json.loads((ROOT / "figures" / f"{product}.csv").read_text().partition("\n")[0].removeprefix("# "))
        assert all((ROOT / "runs" / name / "config.json").exists() for name in head["runs"]), product


@pytest.mark.slow
def test_every_product_comes_from_the_tracked_runs_the_same_each_time(linked, home, capsys):
    """All of them, byte for byte as tracked, and the page that shows them; then without one run, whose products miss it."""
    render.render(jobs=2)
    write_gallery()
    for name in [f"{product}.{suffix}" for product in DRAWN for suffix in SUFFIXES] + ["index.html"]:
        assert (home / "figures" / name).read_bytes() == (ROOT / "figures" / name).read_bytes(), name
    drawn = {path.stem for path in (home / "figures").glob("*.png")}
    assert drawn == set(DRAWN), "what else could be drawn is not tracked"

    gone = "scenes-naive-inputs-s1"
    (linked / gone).unlink()
    capsys.readouterr()
    render.render(jobs=2)
    told = [line for line in capsys.readouterr().out.splitlines() if gone in line]
    assert [line.partition(":")[0] for line in told] == ["ablations_components"] and "gear sweep components" in told[0]
    assert gone in json.loads((home / "figures" / "ablations_components.json").read_text())["needs"]
    for path in (home / "figures").glob("*.png"):
        assert path.read_bytes() == (ROOT / "figures" / path.name).read_bytes(), path.name
