"""gear claims: the paper's claims, judged on the runs of a preset."""

from dataclasses import dataclass

from gear.cli.arguments import parse
from gear.config import Checked, UserError, given_by, nearest
from gear.experiments import verdicts
from gear.experiments.recipes import PRESETS
from gear.experiments.studies import Scoring
from gear.figures.style import figure_path, rounded
from gear.files import check_target, check_writable, write_atomically


@dataclass(frozen=True)
class ClaimOptions(Checked):
    label: str = ""  # of the runs, where they were trained with one
    scoring: Scoring = Scoring()
    out: str = ""  # a .md to write the verdicts to, with those of the studies


def command(names, arguments):
    preset, options = names[0] if names else "scenes", parse(ClaimOptions(), arguments)
    if preset not in PRESETS:
        raise UserError(
            f"unknown preset '{preset}'.{nearest(preset, PRESETS)} Known: {', '.join(PRESETS)}."
        )
    parts = [preset if (preset, options.label) != ("scenes", "") else "", options.label]
    path = figure_path("-".join(filter(None, ["claims", *parts])), "csv")
    check_writable(path.parent, "GEAR_FIGURES")
    with given_by("--out"):
        page = options.out and check_target(options.out, ".md")
    asked = preset, options.label, options.scoring
    table = rounded(verdicts.claims(*asked))
    write_atomically(
        path, lambda temporary: temporary.write_text(table.to_csv(index=False, lineterminator="\n"))
    )
    if page:
        text = verdicts.results_page(table, *asked)
        write_atomically(page, lambda temporary: temporary.write_text(text))
    print(verdicts.claims_in_words(table))
    print(f"{verdicts.tally(table)}; runs of {preset}, small scale; {path}")
