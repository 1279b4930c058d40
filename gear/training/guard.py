"""What stands between a training run and the world: one process a run, signals that wait for the
step, disks that are full.
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

COLLAPSE = 0.5  # share of the effective codes at the start
NOTICE = b"\ngear: finishing what is under way, to save it; Ctrl-C again stops at once\n"


@contextlib.contextmanager
def guarded(run, state, wait=False):
    """Hold `run` for this process while it trains; yields the signals that came, on which the
    caller should save and stop.

    Raises UserError when another process trains the run, unless it shall `wait` for it, and
    TrainingStopped, saying what stands, when a file cannot be written or a loss is not finite.
    """
    try:
        with (
            exclusive(run, wait) if state.processes.main else contextlib.nullcontext(),
            deferred_signals() as signals,
        ):
            yield signals
    except FloatingPointError as error:
        raise TrainingStopped(
            f"run '{run.name}' stopped: {error}. {_standing(run)} Try a lower learning rate, or "
            "look at the data of this step."
        ) from None
    except RuntimeError as error:
        # the CPU has no type for it
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        share, images = state.processes.share, state.processes.share // state.parts
        parts = next((n for n in range(2 * state.parts, share + 1) if share % n == 0), None)
        fits = (
            f"--accumulate {parts} ({share // parts} at once) and --checkpointing need"
            if parts
            else "--checkpointing needs"
        )
        raise TrainingStopped(
            f"run '{run.name}' stopped at step {state.step}: there is not enough memory for "
            f"{images} images at once. "
            f"{_standing(run)} {fits} less and train{'' if parts else 's'} the same; --precision "
            "bf16 is another run."
        ) from None
    except (OSError, SafetensorError) as error:  # safetensors has its own type for a full disk, too
        raise TrainingStopped(
            f"run '{run.name}' stopped at step {state.step}: {error}. {_standing(run)} Make room "
            "or restore access; the same "
            f"command then goes on."
        ) from None


def _standing(run):
    steps = run.checkpoint_steps()
    return (
        f"The state of step {steps[-1]} stands in {run.path / 'checkpoints'}."
        if steps
        else "Nothing was saved yet."
    )


def check_metrics(run, step, every):
    """Raise UserError if metrics.jsonl lacks what was logged, every `every` steps, up to `step`: it
    cannot be had again.
    """
    table = run.metrics()
    if table.empty or table.step.max() < step - step % every:
        last = (
            "holds no line that can be read"
            if table.empty
            else f"can be read up to step {table.step.max()} only"
        )
        raise UserError(
            f"{run.path / 'metrics.jsonl'} {last}; the checkpoint is of step {step}, and going on "
            "would lose what was between. "
            f"Restore the file, or remove {run.path} and train again."
        )


def warn_of_collapse(run, config, record, step):
    """Print a warning when validation images use fewer than COLLAPSE of the effective codes, exp H,
    that they began with.
    """
    size, metrics = record.get("val/usage_size"), run.metrics()
    if size is None or metrics.empty or "val/usage_size" not in metrics:
        return
    began = metrics["val/usage_size"].dropna().iloc[0]
    if size < COLLAPSE * began:
        cause = "a learning rate too high for the tokenizer, or too low an entropy_weight"
        if config.trains("generator") and config.objective.bridge in ("naive", "naive_inputs"):
            cause = "the generator's own loss reaches the tokenizer, which lowers it by saying less"
        print(
            f"run '{run.name}': the codebook is collapsing. At step {step} validation images use "
            f"{size:.1f} effective codes, "
            f"under {COLLAPSE:.0%} of the {began:.1f} at the start. The likely cause: {cause}.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def exclusive(run, wait=False):
    """Hold the run's lock, which the kernel releases even after kill -9.

    Where another process has it, raises UserError naming that, or with `wait` waits until it is
    free.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    # not filelock: the file says who holds it, and filelock before 4 empties it at every attempt
    with open(run.path / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"run '{run.name}' is being trained by process {file.read() or '?'}"
            if not wait:
                raise UserError(
                    f"{holder}. Wait for it, or stop it (kill saves first); the same command then "
                    "goes on from there."
                ) from None
            print(f"{holder}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # a file system without locks, as some network ones are: the run trains all the same
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
    """Collect SIGINT and SIGTERM in the list this yields instead of obeying them; a second SIGINT
    raises Interrupted at once.

    A second SIGTERM does not: some senders reach a process twice. Signals that are ignored stay so,
    and threads other than the main one have no say in signals: there the list stays empty.
    """
    came = []

    def note(number, frame):
        if number == signal.SIGINT and number in came:
            raise Interrupted(
                "stopped at once: the same command goes on from the last checkpoint.", number
            )
        if not came:
            os.write(2, NOTICE)  # no print: the signal may have come in the middle of one
        came.append(number)

    ours = (
        (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    before = {
        n: signal.signal(n, note) for n in ours if signal.getsignal(n) not in (signal.SIG_IGN, None)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # after the caller last looked
        signal.raise_signal(came[0])
