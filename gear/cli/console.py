"""How a command ends in the terminal: with one message and an exit code, never a traceback."""

import contextlib
import io
import sys

from gear.config import Interrupted, TrainingStopped, UserError


@contextlib.contextmanager
def console():
    """Print the error that ends a command as one message, and exit with a code.

    UserError exits with 2, a stopped run or an error of the file system with 1, an interruption by
    the signal N with 128 + N.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold bytes that cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _leave(error, 2)
    except TrainingStopped as error:
        _leave(error, 1)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a full disk, a folder without access
        _leave(f"{error}. Make room or restore access, and run the same command again.", 1)
    except Interrupted as error:
        _leave(error, 128 + error.number)
    except KeyboardInterrupt:
        _leave("interrupted. The same command continues from the last checkpoint.", 130)


def _leave(message, code):
    print(f"gear: {message}", file=sys.stderr)
    sys.exit(code)
