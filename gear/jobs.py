"""Train several runs at once: each a process of its own, no run before its parents, a shared parent once."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace

from tqdm import tqdm

from gear.config import Interrupted, TrainingStopped, UserError
from gear.home import check_writable, runs_dir
from gear.recipes import check_teachers, plan, recipe
from gear.run import Run
from gear.training.guard import deferred_signals
from gear.training.loop import Runtime, is_trained

STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}  # exit codes of what a signal ended


def train_many(names, jobs, runtime=Runtime()):
    """Train the runs `names` and their missing ancestors, at most `jobs` at a time, one CPU thread each.

    A run that fails takes only its descendants with it; raises TrainingStopped naming the failures when the rest is done,
    and after SIGINT or SIGTERM, when every run under way is saved, Interrupted.
    """
    if runtime.shard:
        raise UserError("--shard is for one run, which torchrun starts: name a single recipe.")
    if jobs < 1:
        raise UserError(f"{jobs} runs at a time is none: --jobs has to be at least 1.")
    configs = {n: c for name in names for n, c in plan(recipe(name), name)}
    finished = {n for n, config in configs.items() if is_trained(Run(runs_dir() / n), config, runtime.rebuild)}
    waiting = [n for n in configs if n not in finished]
    check_teachers(configs[n] for n in waiting)
    if waiting:
        check_writable(runs_dir(), "GEAR_RUNS")
    ours, running, failures = list(waiting), {}, {}
    bar = tqdm(
        total=sum(configs[n].steps * configs[n].batch_size for n in waiting), unit=" images", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0, desc=f"{len(waiting)} runs", disable=not waiting,
    )  # fmt: skip
    with deferred_signals() as signals:
        while running or (waiting and not signals):
            for name in [n for n in waiting if configs[n].tokenizer_run in failures]:
                failures[name] = f"its parent {configs[name].tokenizer_run} failed"
                waiting.remove(name)
            ready = [n for n in waiting if configs[n].tokenizer_run in finished or not configs[n].tokenizer_run]
            for name in [] if signals else ready[: jobs - len(running)]:
                running[name] = _start(name, runtime)
                waiting.remove(name)
            time.sleep(0.5)
            if signals:  # a terminal's Ctrl-C has reached the runs, too; a signal to this process alone has not
                for process, _ in running.values():
                    process.terminate()
            for name in [n for n, (process, _) in running.items() if process.poll() is not None]:
                process, log = running.pop(name)
                if process.returncode == 0:
                    finished.add(name)
                elif not (signals and process.returncode in STOPPED):
                    log.seek(0)
                    failures[name] = log.read().decode().strip() or f"exit code {process.returncode}"
            bar.n = sum(Run(runs_dir() / n).logged_step * configs[n].batch_size for n in ours if n not in waiting)
            bar.set_postfix_str(", ".join(running), refresh=False)
            bar.update(0)
        bar.close()
        failed = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        if signals:
            halted = [n for n in ours if n not in (*waiting, *finished, *failures)]
            stands = ", ".join(f"'{n}' stands at step {Run(runs_dir() / n).step}" for n in halted) or "no run was under way"
            raise Interrupted(f"{stands}. The same command goes on from there.\n{failed}".strip(), signals[0])
    if failed:
        raise TrainingStopped(failed)


def _start(name, runtime):
    log = tempfile.TemporaryFile()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gear", "train", name]
    for key, value in asdict(replace(runtime, quiet=True, threads=runtime.threads or 1)).items():
        if value != getattr(Runtime, key):
            command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment), log
