"""gear claims: the paper's claims, judged on the runs of a preset."""

from dataclasses import dataclass

from gear.cli.arguments import parse
from gear.config import Checked, UserError, nearest
from gear.experiments import verdicts
from gear.experiments.recipes import PRESETS
from gear.figures.style import figure_path, rounded
from gear.files import check_writable, write_atomically


@dataclass(frozen=True)
class ClaimOptions(Checked):
    label: str = ""  # of the runs, where they were trained with one


def command(names, arguments):
    preset, label = names[0] if names else "scenes", parse(ClaimOptions(), arguments).label
    if preset not in PRESETS:
        raise UserError(
            f"unknown preset '{preset}'.{nearest(preset, PRESETS)} Known: {', '.join(PRESETS)}."
        )
    name = (
        "claims"
        if (preset, label) == ("scenes", "")
        else "-".join(filter(None, ["claims", preset, label]))
    )
    path = figure_path(name, "csv")
    check_writable(path.parent, "GEAR_FIGURES")
    table = rounded(verdicts.claims(preset, label))
    write_atomically(
        path, lambda temporary: temporary.write_text(table.to_csv(index=False, lineterminator="\n"))
    )
    print(verdicts.claims_in_words(table))
    print(f"{verdicts.tally(table)}; runs of {preset}, small scale; {path}")
