"""gear export: write networks to a file, with a card or in their public layout."""

from pathlib import Path

from gear.checkpoints import open_checkpoint
from gear.cli.usage import Usage
from gear.config import UserError
from gear.public.containers import export

USAGE = Usage(
    names="RUN_OR_FILE OUT",
    examples=(
        "gear export scenes-gear-s0 scenes-gear.safetensors",
        "gear export gear-vq.pt gear-vq.safetensors",
    ),
    details=(
        "OUT ends in .safetensors for our format, which holds every network and a card that "
        "describes them, or in .pt for the public layout that the networks have. Networks without "
        "a public layout are left out of a .pt, and named."
    ),
    takes_runs=True,
)


def command(names, arguments):
    if len(names) != 2 or arguments:
        raise UserError(
            "name what to export and the file to write: gear export RUN_OR_FILE OUT, where OUT "
            "ends in .safetensors or .pt. There are no options."
        )
    path = Path(names[1])
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(
            f"'{names[1]}' ends in neither .safetensors nor .pt: the ending chooses the format of "
            "the file."
        )
    left_out = export(open_checkpoint(names[0]), names[1])
    note = f"without {', '.join(left_out)}: no public layout has names for them" if left_out else ""
    print(path.resolve(), note)
