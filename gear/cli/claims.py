"""gear claims: judge the paper's claims on the runs of a preset."""

from dataclasses import dataclass

from gear.cli.arguments import parse
from gear.cli.usage import Usage
from gear.config import Checked, UserError, given_by, nearest
from gear.experiments import verdicts
from gear.experiments.recipes import PRESETS
from gear.experiments.studies import Scoring
from gear.figures.style import figure_path, rounded
from gear.files import check_target, check_writable, write_atomically


@dataclass(frozen=True)
class ClaimOptions(Checked):
    label: str = ""  # the label that the runs were trained with, if any
    # How the samples were scored; give what `gear sweep` or `gear evaluate` was given.
    scoring: Scoring = Scoring()
    out: str = ""  # a .md file for the verdicts on the claims and on the studies


USAGE = Usage(
    names="[PRESET]",
    options=lambda names: ClaimOptions(),
    examples=("gear claims scenes", "gear claims cifar10-smoke --label zip"),
    details=(
        "PRESET is scenes unless given. The verdicts are printed, and written to data/claims.csv "
        "in the folder of figures (data/claims-PRESET.csv for other presets). A claim without runs "
        "is not testable."
    ),
    choices=PRESETS,
)


def command(names, arguments):
    preset = names[0] if names else "scenes"
    options = parse(ClaimOptions(), arguments, "claims")
    if preset not in PRESETS:
        raise UserError(
            f"unknown preset '{preset}'.{nearest(preset, PRESETS)} Known: {', '.join(PRESETS)}."
        )
    is_default = (preset, options.label) == ("scenes", "")
    parts = ["claims", "" if is_default else preset, options.label]
    path = figure_path("-".join(filter(None, parts)), "csv")
    check_writable(path.parent, "GEAR_FIGURES")
    with given_by("--out"):
        page = options.out and check_target(options.out, ".md")
    table = rounded(verdicts.claims(preset, options.label, options.scoring))
    write_atomically(
        path, lambda temporary: temporary.write_text(table.to_csv(index=False, lineterminator="\n"))
    )
    if page:
        text = verdicts.results_page(table, preset, options.label, options.scoring)
        write_atomically(page, lambda temporary: temporary.write_text(text))
    print(verdicts.claims_in_words(table))
    print(f"{verdicts.tally(table)}; runs of {preset}, small scale; {path}")
