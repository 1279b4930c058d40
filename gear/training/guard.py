"""Protection of a training run: one process per run, signals that wait for the step to end, and
errors (a full disk, too little memory, a loss that is not finite) as messages.
"""

import contextlib
import fcntl
import os
import signal
import sys
import threading

import torch
from safetensors import SafetensorError

from gear.config import Interrupted, TrainingStopped, UserError

COLLAPSE = 0.5  # a codebook collapses below this share of its effective codes at the start
NOTICE = b"\ngear: finishing the current step, then saving; press Ctrl-C again to stop at once\n"


@contextlib.contextmanager
def guarded(run, state, wait=False):
    """Lock `run` for this process while it trains; yields the list of signals received so far.

    The caller should save and stop once the list is not empty. Raises UserError when another
    process trains the run (with `wait`, waits for it instead), and TrainingStopped, which names the
    last checkpoint, when a file cannot be written, memory runs out or a loss is not finite.
    """
    try:
        with (
            exclusive(run, wait) if state.processes.main else contextlib.nullcontext(),
            deferred_signals() as signals,
        ):
            yield signals
    except FloatingPointError as error:
        raise TrainingStopped(
            f"run '{run.name}' stopped: {error}. {_last_checkpoint(run)} Try a lower "
            "learning rate, or look at the data of this step."
        ) from None
    except RuntimeError as error:
        # on a CPU, torch raises a plain RuntimeError when memory runs out
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        share = state.processes.share
        images = share // state.parts
        parts = next((n for n in range(2 * state.parts, share + 1) if share % n == 0), None)
        fits = (
            f"--accumulate {parts} ({share // parts} at once) and --checkpointing need"
            if parts
            else "--checkpointing needs"
        )
        raise TrainingStopped(
            f"run '{run.name}' stopped at step {state.step}: there is not enough memory for "
            f"{images} images at once. {_last_checkpoint(run)} {fits} less memory and "
            f"give{'' if parts else 's'} the same result; --precision bf16 also needs less, but "
            "makes another run."
        ) from None
    except (OSError, SafetensorError) as error:  # safetensors raises its own type for a full disk
        raise TrainingStopped(
            f"run '{run.name}' stopped at step {state.step}: {error}. {_last_checkpoint(run)} Make "
            "room or restore access; the same command then goes on from there."
        ) from None


def _last_checkpoint(run):
    """Return a sentence that says which checkpoint is the last."""
    steps = run.checkpoint_steps()
    return (
        f"The state of step {steps[-1]} is saved in {run.path / 'checkpoints'}."
        if steps
        else "Nothing was saved yet."
    )


def check_metrics(run, step, every):
    """Raise UserError if metrics.jsonl lacks lines up to the checkpoint of `step`.

    A line is logged every `every` steps. A lost line could not be logged again.
    """
    table = run.metrics()
    if table.empty or table.step.max() < step - step % every:
        fault = (
            "holds no line that can be read"
            if table.empty
            else f"can be read up to step {table.step.max()} only"
        )
        raise UserError(
            f"{run.path / 'metrics.jsonl'} {fault}, but the checkpoint is of step {step}: "
            "continuing would lose the lines in between. "
            f"Restore the file, or remove {run.path} and train again."
        )


def warn_of_collapse(run, config, record, step):
    """Print a warning when the number of effective codes, exp(H), on validation images falls below
    COLLAPSE of its value at the start.
    """
    size, metrics = record.get("val/usage_size"), run.metrics()
    if size is None or metrics.empty or "val/usage_size" not in metrics:
        return
    initial = metrics["val/usage_size"].dropna().iloc[0]
    if size < COLLAPSE * initial:
        cause = "a tokenizer learning rate that is too high, or an entropy_weight that is too low"
        if config.trains("generator") and config.objective.bridge in ("naive", "naive_inputs"):
            cause = (
                "the generator's own loss reaches the tokenizer, which can lower it by using fewer "
                "codes"
            )
        print(
            f"run '{run.name}': the codebook is collapsing. At step {step} validation images use "
            f"{size:.1f} effective codes, less than {COLLAPSE:.0%} of the {initial:.1f} at the "
            f"start. The likely cause: {cause}.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def exclusive(run, wait=False):
    """Hold the run's lock, which the operating system releases even after kill -9.

    If another process holds the lock, raises UserError with that process's id, or with `wait` waits
    until the lock is free.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    # the file contains the holder's process id; filelock before 4 would empty it at every attempt
    with open(run.path / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"run '{run.name}' is being trained by process {file.read() or '?'}"
            if not wait:
                raise UserError(
                    f"{holder}. Wait for it, or stop it with `kill`, which saves first; the same "
                    "command then goes on from there."
                ) from None
            print(f"{holder}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # some network file systems have no locks: the run is then trained without one
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def deferred_signals():
    """Collect SIGINT and SIGTERM in the list that this yields, instead of obeying them.

    A second SIGINT raises Interrupted at once. A second SIGTERM does not, because some senders
    reach a process twice. Signals that were ignored stay ignored. Outside the main thread the list
    stays empty, because only the main thread can handle signals.
    """
    received = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise Interrupted(
                "stopped at once: the same command goes on from the last checkpoint.", number
            )
        if not received:
            os.write(2, NOTICE)  # not print(): the signal may have interrupted one
        received.append(number)

    handled = (
        (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    previous_handlers = {
        number: signal.signal(number, note)
        for number in handled
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if received:  # the signal came after the caller last checked the list
        signal.raise_signal(received[0])
