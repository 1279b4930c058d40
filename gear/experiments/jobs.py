"""Run several `gear` commands at once, each in its own process. A command starts after the one that
it depends on, and work that several commands share is done once.
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

# exit codes of a process that a signal ended
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Task:
    """One `gear` command."""

    name: str
    command: tuple  # the words after `gear`
    needs: str  # name of the task that has to succeed first; "": none
    images: int  # training images that the command processes; 0 for scores
    num_seen: Callable[[], int] = lambda: 0  # how many of `images` are processed by now
    progress: Callable[[], str] = lambda: "at its beginning"  # the same in words


def training(planned, words, runtime=Runtime()):
    """Return the Task `gear train WORDS`, which trains the last run of `planned`, and before it the
    ancestors that no other task trains.

    planned: a list of (name, Config), in the order of `recipes.plan`.
    """
    runs = [(Run(runs_dir() / name), config) for name, config in planned]
    last_name = planned[-1][0]
    first_parent = planned[0][1].tokenizer_run
    one_of_several = replace(runtime, quiet=True, threads=runtime.threads or 1)

    def progress():
        newest = next((run for run, _ in reversed(runs) if run.exists), runs[-1][0])
        of_parent = "" if newest.name == last_name else f" of its parent '{newest.name}'"
        return f"at step {newest.step}{of_parent}"

    return Task(
        last_name,
        ("train", *words, *changed_words(one_of_several)),
        "" if is_file(first_parent) else first_parent,
        sum(config.steps * config.batch_size for _, config in runs),
        lambda: sum(run.logged_step * config.batch_size for run, config in runs),
        progress,
    )


def train_many(names, jobs, runtime=Runtime()):
    """Train the runs `names` and their missing ancestors, at most `jobs` at a time, with one CPU
    thread per run.

    If a run fails, only its descendants are skipped. Raises TrainingStopped when all other runs are
    done, with the name and the reason of each failure. After SIGINT or SIGTERM, raises Interrupted
    as soon as all running processes have saved and ended.
    """
    if runtime.fsdp:
        raise UserError("--fsdp is for one run, which torchrun starts: name a single recipe.")
    find_device(runtime.device)
    configs = {
        planned_name: config for name in names for planned_name, config in plan(recipe(name), name)
    }
    finished = {
        name for name, config in configs.items() if is_trained(Run(runs_dir() / name), config)
    }
    waiting = {name: config for name, config in configs.items() if name not in finished}
    check_teachers(waiting.values())
    if waiting:
        check_writable(runs_dir(), "GEAR_RUNS")
    tasks = [training([(name, config)], (name,), runtime) for name, config in waiting.items()]
    work(tasks, finished, jobs)


def work(tasks, finished, jobs, done=lambda name: None):
    """Run `tasks`, at most `jobs` at a time, each after the task that it needs.

    finished: names of tasks and runs that need no work. `done(name)` is called after each task that
    succeeded. Raises as `train_many` does.
    """
    check_value("jobs", jobs, Jobs)
    waiting = {task.name: task for task in tasks}
    all_tasks = dict(waiting)
    finished = set(finished)
    running = {}  # name -> (process, its log)
    failures = {}  # name -> reason
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
            # A task needs at most one other, so a topological sort (graphlib) would be longer.
            for task in [task for task in waiting.values() if task.needs in failures]:
                failures[task.name] = f"its parent {task.needs} failed"
                del waiting[task.name]
            ready = [task for task in waiting.values() if task.needs in finished or not task.needs]
            ready.sort(key=lambda task: task.images > 0)  # scores first: they report early results
            for task in [] if signals else ready[: jobs - len(running)]:
                running[task.name] = _start(task.command)
                del waiting[task.name]
            time.sleep(0.5)
            # Ctrl-C in a terminal reaches the runs as well. A signal to this process alone does
            # not, so it is passed on.
            if signals:
                for process, _ in running.values():
                    process.terminate()
            ended = [name for name, (process, _) in running.items() if process.poll() is not None]
            for name in ended:
                process, log = running.pop(name)
                if process.returncode == 0:
                    finished.add(name)
                    bar.clear()
                    done(name)
                elif not (signals and process.returncode in STOPPED):
                    failures[name] = _reason(process, log)
            started = [task for name, task in all_tasks.items() if name not in waiting]
            bar.n = sum(
                task.images if task.name in finished else task.num_seen() for task in started
            )
            bar.set_postfix_str(", ".join(running), refresh=False)
            bar.update(0)
        bar.close()
        failed = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        if signals:
            not_halted = waiting.keys() | finished | failures.keys()
            halted = [task for name, task in all_tasks.items() if name not in not_halted]
            raise Interrupted(_interruption(halted, failed), signals[0])
    if failed:
        raise TrainingStopped(failed)


def _reason(process, log):
    """Return why a process failed: what it printed, or else its exit code."""
    log.seek(0)
    return log.read().decode().strip() or f"exit code {process.returncode}"


def _interruption(halted, failed):
    """Return the message of Interrupted, from the tasks that a signal ended and the failures."""
    states = [f"'{task.name}' stands {task.progress()}" for task in halted]
    words = ", ".join(states) or "no run was under way"
    return f"{words}. The same command goes on from there.\n{failed}".strip()


def _start(command):
    """Start `gear COMMAND`; returns the process and the file of its output."""
    log = tempfile.TemporaryFile()
    words = [sys.executable, "-m", "gear", *command]
    environment = child_environment() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, stdout=log, stderr=log, env=environment, preexec_fn=_end_with_parent
    )
    return process, log


def _end_with_parent():
    """Ask the kernel to send SIGTERM to this child when its parent dies, even by kill -9, because
    nobody would notice a run that continues.
    """
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)
