"""One page of all figures, each with its claim, its numbers, its runs and its command.

The page is made from the files in the folder of figures (PNG, PDF, CSV with provenance, JSON with
words). It opens from a disk without a network, and has the same bytes each time.
"""

import re
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from gear.config import MissingRuns
from gear.experiments.recipes import run_name, with_parts
from gear.figures.render import NEEDS_WEIGHTS, about, products
from gear.figures.style import PALETTE, figure_path, kept_words, runs_of
from gear.files import figures_dir, write_atomically

MARKDOWN = MarkdownIt("zero").enable(["backticks", "emphasis"])  # other markup stays text
SCALE = "Small scale: "  # begins what `figures.scale` says
ELSEWHERE = "Not in the paper"


def write_gallery():
    """Write figures_dir()/index.html and return its path.

    The products (see `render.products`) whose figure is drawn come first, in the paper's order,
    then those still to draw.
    """
    entries = [_words(product) | _files(product) for product in products()]
    entries.sort(key=lambda entry: (_order(entry["place"]), entry["product"]))
    figures = [entry for entry in entries if entry["size"]]
    scales = (figure["scale"].removeprefix(SCALE).partition(", K =")[0] for figure in figures)
    page = _template().render(
        palette=PALETTE,
        scale="; ".join(dict.fromkeys(filter(None, scales))),
        figures=figures,
        missing=[entry for entry in entries if not entry["size"]],
        needs_weights=NEEDS_WEIGHTS,
    )
    path = figures_dir() / "index.html"
    write_atomically(
        path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace")
    )
    return path


def _template():
    environment = Environment(
        loader=PackageLoader("gear", "figures"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["inline"] = lambda text: Markup(MARKDOWN.renderInline(_with_arrows(text)))
    environment.filters["paragraphs"] = lambda text: Markup(MARKDOWN.render(_with_arrows(text)))
    environment.filters["ending_in_code"] = _ending_in_code
    return environment.get_template("gallery.html.j2")


def _with_arrows(text):
    return text.replace(" -> ", "\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW} ")


def _ending_in_code(needs):
    """Mark up the command with which the text of a MissingRuns ends."""
    return Markup("{}: <code>{}</code>").format(*MissingRuns.split(needs))


def _words(product):
    """Return the saved words of a figure, or its notebook's where `gear figures` has not drawn
    it.
    """
    plain = {
        "command": f"gear figures {product}",
        "parameters": {},
        "said": [],
        "scale": "",
        "needs": "",
    }
    words = kept_words(product) or about(product) | plain
    place = ", ".join(sorted(words["place"].split(", "), key=_order)) or ELSEWHERE
    return words | {"product": product, "place": place, "said": _blocks(words["said"])}


def _order(place):
    """Return what sorts places in the paper: figures, tables, and what the paper does not have."""
    return min(
        ((kind, int(number)) for kind, number in re.findall(r"(Fig|Table)\D*(\d+)", place)),
        default=("~", 0),
    )


def _blocks(lines):
    """Group printed lines as (is in columns, lines): those set in columns stay as they are."""
    blocks = groupby(filter(None, lines), lambda line: bool(re.search(r"\S {2,}\S", line)))
    return [(in_columns, list(block)) for in_columns, block in blocks]


def _files(product):
    """Return a figure's size in pixels, None before it is drawn, its files, and its CSV's
    provenance.

    The runs that the CSV names are listed by recipe and step; there are none where a figure draws
    the paper's numbers alone.
    """
    paths = [figure_path(product, suffix) for suffix in ("png", "pdf", "csv")]
    size = None
    if paths[0].exists():
        with Image.open(paths[0]) as picture:
            size = picture.size  # fixes the layout while the page loads
    runs, recipes = runs_of(product), {}
    for name, run in runs.items():
        recipe, seed = with_parts(name, seed=None), run_name(name).seed
        recipes.setdefault((recipe, run["step"]), []).append(
            run | {"seed": "" if seed is None else str(seed)}
        )
    return {
        "size": size,
        "files": [str(path.relative_to(figures_dir())) for path in paths if path.exists()],
        "num_runs": len(runs),
        "recipes": sorted(recipes.items()),
        "seeds": sorted(
            {int(run["seed"]) for same in recipes.values() for run in same if run["seed"]}
        ),
    }
