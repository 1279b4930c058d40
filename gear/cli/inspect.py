"""gear inspect: describe a checkpoint file or a run."""

from gear.checkpoints import describe, open_checkpoint
from gear.cli.usage import Usage
from gear.config import UserError

USAGE = Usage(
    names="RUN_OR_FILE",
    examples=("gear inspect scenes-gear-s0", "gear inspect gear-vq.pt"),
    details="A file is read without running any code that it may hold.",
    takes_runs=True,
)


def command(names, arguments):
    if len(names) != 1 or arguments:
        raise UserError("name one run or file: gear inspect RUN_OR_FILE. There are no options.")
    print(describe(open_checkpoint(names[0])))
