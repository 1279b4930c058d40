"""The page of figures is made of files alone; what cannot be drawn for want of runs is told, not a
failure of all.
"""

import json
import re

import papermill
import pytest
from PIL import Image

from gear.__main__ import main
from gear.config import TrainingStopped, UserError
from gear.figures import gallery, render

CELLS = [
    ("markdown", "# One & two <three> (Table 7, Fig. 1)\n\nWhat *is* `claimed`: 1 < 2."),
    (
        "code",
        (
            'study: str = "temperature"  # the study\nruns: str = "scenes-gear-s[012]"  # '
            'runs\nseeds: str = "0,1,2"  # seeds'
        ),
    ),
    ("code", 'import gear\n\nprint("seeds", seeds)'),
]


@pytest.fixture
def notebooks(home, monkeypatch):
    """Hand-made notebooks in place of the project's: one, two, ablations, and a notebook to sit
    before.
    """
    cells = [
        {
            "cell_type": kind,
            "id": f"c{i}",
            "metadata": {"tags": ["parameters"]} if i == 1 else {},
            "source": source,
        }
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for i, (kind, source) in enumerate(CELLS)
    ]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    book = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    paths = {name: home / f"{name}.ipynb" for name in ("one", "two", render.ABLATIONS, "tour")}
    for path in paths.values():
        path.write_text(json.dumps(book))
    monkeypatch.setattr(render, "notebooks", lambda: paths)
    for folder in ("pdf", "data"):
        (home / "figures" / folder).mkdir(parents=True)
    return home / "figures"


def drawn(figures, product, **words):
    """Write a product's files by hand, as `gear figures` leaves them."""
    Image.new("L", (40, 20)).save(figures / f"{product}.png")
    (figures / "pdf" / f"{product}.pdf").write_text("pdf")
    runs = {f"scenes-gear-s{seed}": {"config": f"abc{seed}", "step": 200} for seed in (0, 1, 2)}
    runs |= {
        "scenes-gear-s0-tau-0.5": {"config": "def", "step": 200},
        "vq.pt": {"config": "123", "step": 7},
    }
    (figures / "data" / f"{product}.csv").write_text(
        "# " + json.dumps({"figure": product, "runs": runs}) + "\nx\n1\n"
    )
    kept = {
        "title": f"Title of {product}",
        "place": "Fig. 3",
        "claim": "It is so.",
        "command": f"gear figures {product}",
    }
    kept |= {
        "parameters": {"k": {"value": 10, "about": "neighbours"}},
        "said": ["It is 3."],
        "scale": "Small scale: x",
        "needs": "",
    }
    (figures / "data" / f"{product}.json").write_text(json.dumps(kept | words))


def ends(monkeypatch, how, calls=None):
    """Let papermill end as `how(product)` says: an exception is raised, anything else returned."""

    def execute_notebook(source, out, parameters, **_):
        product = out.rpartition("/")[2].removesuffix(".ipynb")
        (calls if calls is not None else {})[product] = parameters
        if isinstance(end := how(product), Exception):
            raise end
        shown = [{"output_type": "stream", "name": name, "text": text} for name, text in end]
        executed = json.loads(open(source).read())
        executed["cells"][-1]["outputs"] = shown
        with open(out, "w") as file:
            json.dump(executed, file)

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)


def stop(evalue, ename="MissingRuns"):
    return papermill.PapermillExecutionError(3, 3, "", ename, evalue, [])


def test_products_are_figures_and_an_ablation_is_one_a_study(notebooks):
    found = render.products()
    assert {"one", "two", "tab5_temperature", "tab13_resolution"} <= set(found) and len(
        found
    ) == 2 + len(render.STUDIES)
    assert found["one"] == ("one", {}) and found["tab9_size"] == (
        render.ABLATIONS,
        {"study": "size"},
    )


def test_the_projects_own_products_have_a_title_and_a_claim():
    for product in render.products():
        words = render.about(product)
        assert (
            words["title"] and words["claim"] and "(Fig" not in words["title"] + words["place"]
        ), product
        assert not words["place"] or gallery._order(words["place"])[1]


def test_every_product_once_in_the_papers_order_and_links_exist(notebooks):
    drawn(notebooks, "one", place="Table 4")
    drawn(notebooks, "two", place="Table 7, Fig. 1")
    drawn(notebooks, "tab11_depth", place="Table 11")
    page = gallery.write_gallery().read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["two", "one", "tab11_depth", "needs"]
    for product in render.products():
        assert page.count(f'id="{product}"') == 1
    for kind, link in re.findall(r'(href|src)="([^"]+)"', page):
        assert f'id="{link[1:]}"' in page if link[0] == "#" else (notebooks / link).exists(), kind
    assert (
        'width="40" height="20" loading="lazy"' in page
        and "Fig. 1, Table 7" in page
        and "It is 3." in page
    )
    assert "-p k 10" in page and "<code>gear figures one</code>" in page


def test_runs_are_grouped_by_recipe_label_and_step(notebooks):
    drawn(notebooks, "one")
    page = gallery.write_gallery().read_text()
    assert "5 runs of 3 recipes, seeds 0, 1, 2" in page and "<td>abc0 abc1 abc2</td>" in page
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>(\d+)</td>", page)
    assert rows == [
        ("scenes-gear", "0, 1, 2", "200"),
        ("scenes-gear-tau-0.5", "0", "200"),
        ("vq.pt", "", "7"),
    ]


def test_text_is_escaped_and_marked_up(notebooks):
    drawn(
        notebooks,
        "one",
        title='A "<b>" & b',
        claim="*Soft* is `a < b`; 2 * 3 * 4.\n\nMore.",
        said=["a -> b", "x   1", "y   <2"],
    )
    page = gallery.write_gallery().read_text()
    assert "<em>Soft</em> is <code>a &lt; b</code>; 2 * 3 * 4.</p>\n<p>More.</p>" in page
    assert '<b>"' not in page and 'alt="A &#34;&lt;b&gt;&#34; &amp; b. ' in page
    assert (
        "a\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW} b" in page
        and "<pre>x   1\ny   &lt;2</pre>" in page
    )


def test_what_notebooks_and_runs_say_is_never_a_tag(notebooks):
    """Wherever it stands: words, parameters, names of runs, what is needed; of a figure drawn and
    of one that is not.
    """
    tag = "<script>alert('x')</script>"
    words = {
        key: f"{key} {tag}" for key in ("title", "place", "claim", "command", "scale", "needs")
    }
    words |= {"parameters": {tag: {"value": tag, "about": tag}}, "said": [tag, f"{tag}   {tag}"]}
    drawn(notebooks, "one", **words)
    drawn(notebooks, "two", **words)
    (notebooks / "two.png").unlink()
    runs = {f"a{tag}-s0": {"config": tag, "step": tag}}
    (notebooks / "data" / "one.csv").write_text(f"# {json.dumps({'runs': runs})}\n")
    page = gallery.write_gallery().read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(") == 22


def test_the_same_files_give_the_same_page_and_nothing_is_fetched(notebooks):
    drawn(notebooks, "one")
    first = gallery.write_gallery().read_bytes()
    assert gallery.write_gallery().read_bytes() == first
    assert (
        not re.search(rb"https?:|//|<script|@import|url\(", first)
        and str(notebooks).encode() not in first
    )


def test_a_product_without_a_figure_is_named_with_what_it_needs(notebooks):
    drawn(notebooks, "one", needs="no run 'a<b'. Train it: gear train a-s1")
    (notebooks / "one.png").unlink()
    page = gallery.write_gallery().read_text()
    assert (
        '<section id="one"' not in page
        and "no run &#39;a&lt;b&#39;. Train it: <code>gear train a-s1</code>" in page
    )
    assert (
        "Drawn by <code>gear figures two</code>." in page and "One &amp; two &lt;three&gt;" in page
    )


def test_words_are_kept_beside_the_figure(notebooks, monkeypatch, tiny):
    ends(
        monkeypatch,
        lambda _: [("stdout", "It is "), ("stderr", "noise"), ("stdout", "so.\nAnd so.\n")],
    )
    (notebooks / "data" / "one.csv").write_text(
        "# " + json.dumps({"runs": {"tiny": {"config": "c", "step": 1}}}) + "\n"
    )
    render.execute("one", {"runs": "a b"})
    words = json.loads((notebooks / "data" / "one.json").read_text())
    assert (
        words["title"] == "One & two <three>"
        and words["place"] == "Table 7, Fig. 1"
        and words["said"] == ["It is so.", "And so."]
    )
    assert words["command"] == "gear figures one -p runs 'a b'" and words["scale"].startswith(
        "Small scale: scenes"
    )
    assert (
        words["parameters"]["runs"] == {"value": "a b", "about": "runs"}
        and words["parameters"]["seeds"]["value"] == "0,1,2"
    )
    render.execute(render.ABLATIONS, {"study": "size"})
    words = json.loads((notebooks / "data" / "tab9_size.json").read_text())
    assert words["place"] == "Table 9" and words["title"].endswith(": generator size")
    assert (
        words["command"] == "gear figures tab9_size"
        and (notebooks / "executed" / "tab9_size.ipynb").exists()
    )


def test_missing_runs_are_told_when_all_are_drawn_and_a_failure_when_named(
    notebooks, home, monkeypatch, capsys
):
    message = (
        f"no run 'x-s1'. Train it: gear train x-s1\nRuns are looked for in {home / 'runs'}. Did "
        "you mean 'x-s0'?"
    )
    ends(monkeypatch, lambda product: [] if product == "two" else stop(message))
    main(["figures"])
    out = capsys.readouterr().out
    assert "one: needs runs: no run 'x-s1'. Train it: gear train x-s1\n" in out
    assert "two: 0 s" in out and out.endswith("index.html\n")
    assert (
        "<br>no run &#39;x-s1&#39;. Train it: <code>gear train x-s1</code></li>"
        in (notebooks / "index.html").read_text()
    )
    (notebooks / "index.html").unlink()
    with pytest.raises(SystemExit) as end:
        main(["figures", "one"])
    assert (
        end.value.code == 1
        and "notebook 'one', cell 3: MissingRuns: no run 'x-s1'" in capsys.readouterr().err
    )
    assert (notebooks / "index.html").exists()
    drawn(notebooks, "one")
    with pytest.raises(render.NeedsRuns):
        render.execute("one")
    words = json.loads((notebooks / "data" / "one.json").read_text())
    assert (
        words["said"] == ["It is 3."]
        and words["needs"] == "no run 'x-s1'. Train it: gear train x-s1"
    )
    page = gallery.write_gallery().read_text()
    assert (
        "all its runs existed. Now no run &#39;x-s1&#39;. Train it: <code>gear train "
        "x-s1</code></p>"
        in page
        and "It is 3." in page
    )
    drawn(notebooks, "one")
    with pytest.raises(render.NeedsRuns):
        render.execute("one", {"runs": "x-s1"})
    needs = json.loads((notebooks / "data" / "one.json").read_text())["needs"]
    assert needs == "", "asked with other parameters, nothing is said of it"


def test_a_figure_is_drawn_again_when_its_runs_are_back(notebooks, home, monkeypatch, capsys):
    ends(monkeypatch, lambda product: [])
    drawn(notebooks, "one")
    main(["figures"])
    ends(monkeypatch, lambda product: stop("no run 'x-s1'. Train it: gear train x-s1"))
    main(["figures", "--force"])
    ends(monkeypatch, lambda product: [("stdout", "It is back.\n")])
    capsys.readouterr()
    main(["figures"])
    assert "one: 0 s" in capsys.readouterr().out
    words = json.loads((notebooks / "data" / "one.json").read_text())
    assert (words["needs"], words["said"]) == ("", ["It is back."])


@pytest.mark.parametrize(
    "error",
    [
        stop("'a'", "KeyError"),
        stop("cut short. train again: gear train x", "UserError"),
        OSError("full"),
    ],
)
def test_other_errors_are_failures_and_the_others_are_drawn(error, notebooks, monkeypatch, capsys):
    ends(monkeypatch, lambda product: error if product == "one" else [])
    with pytest.raises(TrainingStopped, match="notebook 'one'"):
        render.render()
    assert "one: failed" in (out := capsys.readouterr().out) and "two: 0 s" in out


@pytest.mark.parametrize(
    "words, expected",
    [
        ([render.ABLATIONS], {f"tab{s.table}_{n}" for n, s in render.STUDIES.items()}),
        (["tab5_temperature"], {"tab5_temperature"}),
        ([render.ABLATIONS, "-p", "study", "temperature"], {"tab5_temperature"}),
        (["one", "two"], {"one", "two"}),
        (["tour"], {"tour"}),
    ],
)
def test_a_notebook_stands_for_its_products(words, expected, notebooks, monkeypatch):
    calls = {}
    ends(monkeypatch, lambda _: [], calls)
    main(["figures", *words])
    assert set(calls) == expected
    assert all(
        given == ({"study": name.partition("_")[2]} if "_" in name else {})
        for name, given in calls.items()
    )


def test_a_product_is_up_to_date_by_itself(notebooks, monkeypatch, capsys):
    ends(monkeypatch, lambda product: drawn(notebooks, product) or [])
    main(["figures", "tab9_size"])
    main(["figures", "tab9_size", "tab11_depth"])
    out = capsys.readouterr().out
    assert "tab9_size: up to date" in out and "tab11_depth: 0 s" in out


@pytest.mark.parametrize("content", ("", "{", "[1]", "null", "\0", "[" * 100_000))
@pytest.mark.parametrize("file", ("executed/one.json", "data/one.json"))
def test_a_damaged_record_of_what_was_drawn_is_written_again(
    file, content, notebooks, monkeypatch, capsys
):
    """The stamp of what a figure was made of, and its words: the figure is drawn again, and the
    page written all the same.
    """
    calls = {}
    ends(monkeypatch, lambda product: drawn(notebooks, product) or [], calls)
    main(["figures", "one"])
    before = (notebooks / file).read_text()
    (notebooks / file).write_text(content)
    calls.clear()
    gallery.write_gallery()
    main(["figures", "one"])
    assert calls.keys() == {"one"} and (notebooks / file).read_text() == before
    main(["figures", "one"])
    assert "one: up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "head",
    ("", "# {", "# []", '# {"runs": [1]}', '# {"runs": {"a": 3}}', "\0", "# " + "[" * 100_000),
)
def test_a_figure_whose_provenance_is_damaged_shows_none(head, notebooks):
    drawn(notebooks, "one")
    (notebooks / "data" / "one.csv").write_text(f"{head}\nx\n1\n")
    assert (
        "Title of one" in gallery.write_gallery().read_text()
        and "Drawn from" not in gallery.write_gallery().read_text()
    )


def test_unknown_products_and_parameters_no_product_has(notebooks):
    with pytest.raises(
        UserError,
        match="unknown notebook 'tab5_tempereture'. Did you mean 'tab5_temperature'",
    ):
        render.render(["tab5_tempereture"])
    with pytest.raises(UserError, match="no figure is drawn with {'study': 'x'}"):
        render.render([render.ABLATIONS], parameters={"study": "x"})


@pytest.mark.parametrize(
    "seeds, pattern, value", [("0", "scenes-gear-s0", "0"), ("1,0", "scenes-gear-s[01]", "0,1")]
)
def test_seeds_take_the_place_of_those_that_notebooks_name(
    seeds, pattern, value, notebooks, monkeypatch
):
    calls = {}
    ends(monkeypatch, lambda _: [], calls)
    main(["figures", "one", "tab9_size", "--seeds", seeds])
    assert calls["one"] == {"runs": pattern, "seeds": value}
    assert calls["tab9_size"] == {"runs": pattern, "seeds": value, "study": "size"}
    main(["figures", "one", "--seeds", seeds, "-p", "runs", "mine", "--force"])
    assert calls["one"]["runs"] == "mine", "what is said of a parameter goes before"


def test_seeds_that_no_pattern_can_say(notebooks):
    assert render.seeded("one", [12])["runs"] == "scenes-gear-s12"
    with pytest.raises(UserError, match="one digit for each seed"):
        render.seeded("one", [0, 12])
