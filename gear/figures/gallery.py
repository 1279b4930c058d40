"""One page of every figure: its claim, its numbers, the runs it was drawn from and the command that draws it.

It is made of what stands in the folder of figures (PNG, PDF, CSV with provenance, JSON with words), opens from a disk without
a network, and has the same bytes each time.
"""

import re
from html import escape
from pathlib import Path

from PIL import Image

from gear.config import MissingRuns
from gear.experiments.recipes import run_name, with_parts
from gear.figures.render import NEEDS_WEIGHTS, about, products
from gear.figures.style import PALETTE, figure_path, kept_words, runs_of
from gear.files import figures_dir, write_atomically

STYLE = f"""
:root {{ --blue: {PALETTE["warm-up"]}; --red: {PALETTE["GEAR"]}; --ink: #1D1F23; --grey: #62676F; --line: #E3E5E8; }}
* {{ box-sizing: border-box; }}
html {{ scroll-behavior: smooth; }}
body {{ margin: 0 auto; max-width: 1100px; padding: 56px 32px 72px; background: #FFF; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 38px; line-height: 1.15; margin: 4px 0 20px; letter-spacing: -.015em; }}
h2 {{ font-size: 26px; line-height: 1.25; margin: 2px 0 10px; letter-spacing: -.01em; }}
h2 a, nav a {{ color: inherit; text-decoration: none; }}
a {{ color: var(--blue); }}
p {{ margin: 0 0 10px; }}
code, pre, .runs td:last-child {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
code {{ font-size: .88em; background: #F4F5F6; padding: 1px 5px; border-radius: 4px; overflow-wrap: anywhere; }}
header, section {{ border-top: 1px solid var(--line); padding-top: 28px; margin-top: 56px; }}
header {{ border-top: 5px solid var(--red); margin-top: 0; }}
.place {{ color: var(--blue); font-weight: 600; font-size: 14px; margin: 0; }}
.claim, .small {{ max-width: 52em; }}
.claim {{ color: #3C4047; }}
.small {{ border-left: 3px solid var(--red); padding-left: 14px; }}
nav {{ margin-top: 28px; }}
nav ol, .needs {{ list-style: none; margin: 0; padding: 0; }}
nav a {{ display: flex; gap: 16px; padding: 5px 0; border-bottom: 1px solid var(--line); }}
nav a:hover span, h2 a:hover {{ color: var(--red); }}
nav b {{ flex: 0 0 10.5em; color: var(--blue); font-weight: 600; font-size: 14px; padding-top: 1px; }}
figure {{ margin: 20px 0 18px; }}
img {{ display: block; width: 100%; height: auto; }}
figcaption {{ display: flex; justify-content: flex-end; gap: 10px; padding-top: 4px; font-size: 13px; }}
.said p {{ font-size: 15px; margin: 0 0 6px; padding-left: 14px; text-indent: -14px; }}
.said p::before {{ content: "\\2013\\00A0"; color: var(--grey); }}
pre {{ columns: 2 30em; column-gap: 32px; font-size: 12px; line-height: 1.5; margin: 0 0 10px; white-space: pre-wrap; }}
details {{ border-top: 1px solid var(--line); font-size: 14px; padding: 7px 0; color: var(--grey); }}
details[open] summary {{ margin-bottom: 8px; }}
summary {{ cursor: pointer; }}
.said + details {{ margin-top: 16px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; color: var(--ink); }}
td, th {{ text-align: left; vertical-align: top; padding: 3px 18px 3px 0; }}
th {{ color: var(--grey); font-weight: 500; }}
.runs td:last-child {{ color: var(--grey); font-size: 12px; }}
.needs li {{ padding: 8px 0; border-bottom: 1px solid var(--line); font-size: 14px; overflow-wrap: anywhere; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 9.5pt; }}
  h2 {{ font-size: 16pt; }}
  .said p, details, table, figcaption {{ font-size: 8.5pt; margin: 0 0 2pt; }}
  section {{ break-before: page; margin: 0; padding: 0; border: 0; }}
  figure, tr, .said p {{ break-inside: avoid; }}
  details::details-content {{ content-visibility: visible; height: auto; }}
}}
"""
SCALE = "Small scale: "  # begins what `figures.scale` says
ELSEWHERE = "Not in the paper"


def write_gallery():
    """Write figures_dir()/index.html: every product with its figure, in the paper's order, then those without; returns it."""
    words = {product: _words(product) for product in products()}
    order = sorted(words, key=lambda product: (_order(words[product]["place"]), product))
    drawn = [product for product in order if figure_path(product, "png").exists()]
    lacking = [product for product in order if product not in drawn]
    page = "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>GEAR at small scale: figures, claims, numbers, runs</title>", f"<style>{STYLE}</style>",
        _header({product: words[product] for product in drawn}, bool(lacking)),
        *(_section(product, words[product]) for product in drawn),
        _needs({product: words[product] for product in lacking}), "</html>\n",
    ])  # fmt: skip
    path = figures_dir() / "index.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))
    return path


def _words(product):
    """Return what was kept beside a figure; of one that `gear figures` has not tried, what its notebook says."""
    plain = {"command": f"gear figures {product}", "parameters": {}, "said": [], "scale": "", "needs": ""}
    words = kept_words(product) or about(product) | plain
    return words | {"place": ", ".join(sorted(words["place"].split(", "), key=_order)) or ELSEWHERE}


def _order(place):
    """Return what sorts places in the paper: figures, tables, and what the paper does not have."""
    return min(((kind, int(number)) for kind, number in re.findall(r"(Fig|Table)\D*(\d+)", place)), default=("~", 0))


def _inline(text):
    """Return a notebook's markdown, as far as it has `code` and *emphasis*, as HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False).replace(" -&gt; ", "&nbsp;&rarr; "))
    return re.sub(r"\*([^*\s](?:[^*]*[^*\s])?)\*", r"<em>\1</em>", text)


def _paragraphs(text, attributes=""):
    return "\n".join(f"<p{attributes}>{_inline(part)}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _header(drawn, lacking):
    scales = (words["scale"].removeprefix(SCALE).partition(", K =")[0] for words in drawn.values())
    what = "; ".join(dict.fromkeys(filter(None, scales)))
    entries = [(product, words["place"], words["title"]) for product, words in drawn.items()]
    entries += [("needs", "", "Not drawn yet")] if lacking else []
    contents = "\n".join(
        f'<li><a href="#{product}"><b>{escape(place)}</b><span>{_inline(title)}</span></a></li>'
        for product, place, title in entries
    )
    return f"""<header>
<p class="place">Guided End-to-End AutoRegression for Image Synthesis, arXiv 2606.32039</p>
<h1>GEAR, redrawn at small scale</h1>
<p class="small"><strong>These are small-scale results{f" ({escape(what)})" if what else ""}.</strong> They show that the
mechanism runs and in which direction things move; they are not the paper's results, and where its
numbers are drawn, the figure says so. Each figure says below its axes with what it was made: data, image size, tokens, codes K,
steps, seeds. What is said of it was computed from the numbers it plots.</p>
<nav><ol>
{contents}
</ol></nav>
</header>"""


def _section(product, words):
    with Image.open(figure_path(product, "png")) as picture:
        width, height = picture.size  # told, so that a page still loading does not move
    files = filter(Path.exists, (figure_path(product, suffix) for suffix in ("png", "pdf", "csv")))
    links = "".join(f'<a href="{f.relative_to(figures_dir())}">{f.suffix[1:].upper()}</a>' for f in files)
    return f"""<section id="{product}">
<p class="place">{escape(words["place"])}</p>
<h2><a href="#{product}">{_inline(words["title"])}</a></h2>
{_paragraphs(words["claim"], ' class="claim"')}
<figure>
<a href="{product}.png"><img src="{product}.png" width="{width}" height="{height}" loading="lazy"
alt="{escape(words["title"])}. {escape(words["scale"])}"></a>
<figcaption>{links}</figcaption>
</figure>
{_gone(words["needs"])}<div class="said">
{_said(words["said"])}
</div>
{_runs(product)}
<details><summary>Drawn by <code>{escape(words["command"])}</code>, {_count(len(words["parameters"]), "parameter")}</summary>
{_parameters(words["parameters"])}
</details>
</section>"""


def _gone(needs):
    """Return what a figure that stands would need to be drawn again, where some of its runs are gone."""
    return f'<p class="small">Drawn when all its runs were there. Now {_asked(needs)}</p>\n' if needs else ""


def _asked(needs):
    sentence, command = (escape(part, quote=False) for part in MissingRuns.split(needs))
    return f"{sentence}: <code>{command}</code>" if command else ""


def _said(lines):
    """Return printed sentences as paragraphs; lines set in columns stay as they are."""
    blocks = []
    for line in filter(None, lines):
        columns = bool(re.search(r"\S {2,}\S", line))
        if columns and blocks and blocks[-1][0]:
            blocks[-1][1].append(line)
        else:
            blocks.append((columns, [line]))
    return "\n".join(
        f"<pre>{escape(chr(10).join(block), quote=False)}</pre>" if columns else f"<p>{_inline(block[0])}</p>"
        for columns, block in blocks
    )


def _runs(product):
    """Return the provenance in a figure's CSV: a line for each recipe and step, with its seeds and configurations."""
    runs, groups = runs_of(product), {}
    if not runs:  # the paper's numbers alone
        return ""
    for name, made in runs.items():
        seed = run_name(name).seed
        seed = "" if seed is None else str(seed)
        groups.setdefault((with_parts(name, seed=None), made["step"]), []).append((seed, made["config"]))
    rows = "\n".join(
        f"<tr><td>{escape(recipe)}</td><td>{', '.join(seed for seed, _ in made)}</td><td>{step}</td>"
        f"<td>{' '.join(escape(config) for _, config in made)}</td></tr>"
        for (recipe, step), made in sorted(groups.items())
    )
    seeds = sorted({int(seed) for made in groups.values() for seed, _ in made if seed})
    seeds = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    return f"""<details><summary>Drawn from {_count(len(runs), "run")} of {_count(len(groups), "recipe")}{seeds}</summary>
<table class="runs"><tr><th>recipe</th><th>seeds</th><th>step</th><th>configurations</th></tr>
{rows}
</table></details>"""


def _count(number, noun):
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _parameters(parameters):
    """Return what can be said with -p KEY VALUE, and what was."""
    rows = "\n".join(
        f"<tr><td><code>-p {escape(key)} {escape(str(one['value']))}</code></td><td>{_inline(one['about'])}</td></tr>"
        for key, one in parameters.items()
    )
    return f"<table>\n{rows}\n</table>"


def _needs(lacking):
    """Return the list of products without a figure, each with what it needs."""
    if not lacking:
        return ""
    items = []
    for product, words in lacking.items():
        weights = " It needs weights, which records come without: <code>make demo</code>." * (product in NEEDS_WEIGHTS)
        command = f"Drawn by <code>{escape(words['command'])}</code>.{weights}"
        said = _asked(words["needs"]) or command
        place = f'<span class="place">{escape(words["place"])}</span>'
        items.append(f'<li id="{product}">{place} <strong>{_inline(words["title"])}</strong><br>{said}</li>')
    return "\n".join(['<section id="needs">', "<h2>Not drawn yet</h2>", '<ul class="needs">', *items, "</ul>", "</section>"])
