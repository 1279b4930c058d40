"""Several commands at once: each a process of its own, nothing before what it needs, what is shared
once.
"""

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tqdm import tqdm

from gear.checkpoints import is_file
from gear.config import (
    Interrupted,
    Jobs,
    TrainingStopped,
    UserError,
    changed_words,
    check_value,
)
from gear.device import find_device
from gear.experiments.recipes import check_teachers, plan, recipe
from gear.files import check_writable, child_environment
from gear.runs.folder import runs_dir
from gear.runs.run import Run
from gear.training.guard import deferred_signals
from gear.training.loop import Runtime, is_trained

# exit codes of what a signal ended
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Task:
    """One command of gear: its name, its words, the name of the task it waits for ("" for none),
    its size and how far it is.
    """

    name: str
    command: tuple
    needs: str
    images: int
    seen: Callable[[], int] = lambda: 0  # of `images`
    at: Callable[[], str] = lambda: "not done"  # how far it came, in words


def training(planned, words, runtime=Runtime()):
    """Return the Task that trains `planned`, a run after such of its ancestors as nothing else
    waits for: `gear train WORDS`.

    planned: (name, Config) each, in the order of `recipes.plan`.
    """
    runs, name = [(Run(runs_dir() / name), config) for name, config in planned], planned[-1][0]
    one_of_several = replace(runtime, quiet=True, threads=runtime.threads or 1)

    def at():
        run = next((run for run, _ in reversed(runs) if run.exists), runs[-1][0])
        return f"at step {run.step}" + (f" of its parent '{run.name}'" if run.name != name else "")

    return Task(
        name,
        ("train", *words, *changed_words(one_of_several)),
        "" if is_file(planned[0][1].tokenizer_run) else planned[0][1].tokenizer_run,
        sum(config.steps * config.batch_size for _, config in runs),
        lambda: sum(run.logged_step * config.batch_size for run, config in runs),
        at,
    )


def train_many(names, jobs, runtime=Runtime()):
    """Train the runs `names` and their missing ancestors, at most `jobs` at a time, one CPU thread
    each.

    A run that fails takes only its descendants with it; raises TrainingStopped naming the failures
    when the rest is done, and after SIGINT or SIGTERM, when every run under way is saved,
    Interrupted.
    """
    if runtime.fsdp:
        raise UserError("--fsdp is for one run, which torchrun starts: name a single recipe.")
    find_device(runtime.device)
    configs = {n: c for name in names for n, c in plan(recipe(name), name)}
    finished = {n for n, config in configs.items() if is_trained(Run(runs_dir() / n), config)}
    waiting = {n: config for n, config in configs.items() if n not in finished}
    check_teachers(waiting.values())
    if waiting:
        check_writable(runs_dir(), "GEAR_RUNS")
    work([training([one], (one[0],), runtime) for one in waiting.items()], finished, jobs)


def work(tasks, finished, jobs, done=lambda name: None):
    """Do `tasks`, at most `jobs` at a time and none before what it needs is among the `finished`
    (names).

    `done(name)` is called after each that succeeded. Raises as `train_many` does.
    """
    check_value("jobs", jobs, Jobs)
    waiting, finished, running, failures = (
        {task.name: task for task in tasks},
        set(finished),
        {},
        {},
    )
    ours = dict(waiting)
    bar = tqdm(
        total=sum(task.images for task in tasks),
        unit=" images",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        desc=f"{len(tasks)} runs",
        disable=not tasks,
    )
    with deferred_signals() as signals:
        while running or (waiting and not signals):
            # A task waits for at most one other: graphlib's sorter took more lines, not fewer.
            for task in [t for t in waiting.values() if t.needs in failures]:
                failures[task.name] = f"its parent {task.needs} failed"
                del waiting[task.name]
            ready = [t for t in waiting.values() if t.needs in finished or not t.needs]
            ready.sort(key=lambda task: task.images > 0)  # scores first: what is known is told
            for task in [] if signals else ready[: jobs - len(running)]:
                running[task.name] = _start(task.command)
                del waiting[task.name]
            time.sleep(0.5)
            # a terminal's Ctrl-C has reached the runs, too; a signal to this process alone has not
            if signals:
                for process, _ in running.values():
                    process.terminate()
            for name in [n for n, (process, _) in running.items() if process.poll() is not None]:
                process, log = running.pop(name)
                if process.returncode == 0:
                    finished.add(name)
                    bar.clear()
                    done(name)
                elif not (signals and process.returncode in STOPPED):
                    log.seek(0)
                    failures[name] = (
                        log.read().decode().strip() or f"exit code {process.returncode}"
                    )
            bar.n = sum(
                t.images if n in finished else t.seen() for n, t in ours.items() if n not in waiting
            )
            bar.set_postfix_str(", ".join(running), refresh=False)
            bar.update(0)
        bar.close()
        failed = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        if signals:
            halted = [
                t for n, t in ours.items() if n not in (waiting.keys() | finished | failures.keys())
            ]
            stands = (
                ", ".join(f"'{t.name}' stands {t.at()}" for t in halted) or "no run was under way"
            )
            raise Interrupted(
                f"{stands}. The same command goes on from there.\n{failed}".strip(), signals[0]
            )
    if failed:
        raise TrainingStopped(failed)


def _start(command):
    log, words = tempfile.TemporaryFile(), [sys.executable, "-m", "gear", *command]
    environment = child_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=log, stderr=log, env=environment, preexec_fn=_end_with_parent
    ), log


def _end_with_parent():
    """Have the kernel send SIGTERM to this child when its parent dies, even by kill -9: no run goes
    on that nobody sees.
    """
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)
