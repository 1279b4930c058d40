"""gear export: networks to a file, with a card or in the public layout they have."""

from pathlib import Path

from gear.checkpoints import open_checkpoint
from gear.config import UserError
from gear.public.containers import export


def command(names, arguments):
    if len(names) != 2 or arguments:
        raise UserError(
            "name what to export and where to: gear export FILE OUT.safetensors, or OUT.pt."
        )
    if Path(names[1]).suffix not in (".safetensors", ".pt"):
        raise UserError(
            f"'{names[1]}' ends in neither .safetensors nor .pt: which of the two is asked for?"
        )
    left_out = export(open_checkpoint(names[0]), names[1])
    print(
        Path(names[1]).resolve(),
        f"without {', '.join(left_out)}: no public layout has names for them" if left_out else "",
    )
