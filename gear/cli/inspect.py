"""gear inspect: what a checkpoint file or a run holds."""

from gear.checkpoints import describe, open_checkpoint
from gear.config import UserError


def command(names, arguments):
    if len(names) != 1 or arguments:
        raise UserError("name one run or file: gear inspect FILE.")
    print(describe(open_checkpoint(names[0])))
