"""How a command meets the terminal: names of any bytes can be printed, and every end has one
message and an exit code.
"""

import contextlib
import io
import sys

from gear.config import Interrupted, TrainingStopped, UserError


@contextlib.contextmanager
def console():
    """Run a command: a user's mistake prints one message and exits with code 2, a stopped run with
    code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold bytes that no encoding has
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _leave(error, 2)
    except TrainingStopped as error:
        _leave(error, 1)
    except BrokenPipeError:  # whoever read what is printed has read enough
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a full disk, a folder without access
        _leave(f"{error}. Make room or restore access, and give the same command again.", 1)
    except Interrupted as error:
        _leave(error, 128 + error.number)
    except KeyboardInterrupt:
        _leave("interrupted. The same command goes on from the last checkpoint.", 130)


def _leave(message, code):
    print(f"gear: {message}", file=sys.stderr)
    sys.exit(code)
