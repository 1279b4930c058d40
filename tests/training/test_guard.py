"""Signals, a second process and a full disk: the run stops with one message, no saved step is lost,
and the same command continues to the same bytes.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import jupyter_client
import pytest
from test_cli import fingerprint, mistake
from test_loop import assert_same_run

from gear.__main__ import main
from gear.config import Interrupted
from gear.experiments import jobs
from gear.runs.run import Run
from gear.training.guard import deferred_signals, exclusive

OPTIONS = ["--quiet", "--device", "cpu", "--threads", "1"]


class Background:
    """`gear ARGUMENTS` in a separate process: a fork, which does not import everything again."""

    def __init__(self, log, *arguments):
        self.log, self.pid, self.code = log, os.fork(), None
        if self.pid == 0:
            code = 99
            try:
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
                sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
                signal.signal(
                    signal.SIGINT, signal.default_int_handler
                )  # SIGINT is ignored in a background job
                main(list(arguments))
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait_for(self, path):
        deadline = time.time() + 300
        while not path.exists():
            assert time.time() < deadline and os.waitpid(self.pid, os.WNOHANG) == (0, 0)
            time.sleep(0.002)

    def wait(self):
        """Return the exit code (negative if a signal ended the process) and the output."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code, self.log.read_text()


@pytest.fixture
def background(home):
    """Return a function that starts a command in the background; it is killed after the test."""
    started = []

    def start(*arguments):
        started.append(Background(home / f"{len(started)}.log", *arguments))
        return started[-1]

    yield start
    for process in started:
        if process.code is None:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)


@contextlib.contextmanager
def disk_of(size):
    """Simulate a full disk: inside the block, no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, number",
    [
        ("tiny-joint", signal.SIGINT),
        pytest.param("tiny-tokenizer", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_step_and_the_same_command_gives_the_same_bytes(
    name, number, tiny, tiny_runs, background
):
    shutil.rmtree(tiny / name)
    process = background("train", name, *OPTIONS)
    process.wait_for(tiny / name / "checkpoints" / "0000006")
    os.kill(process.pid, number)
    code, output = process.wait()
    step = Run.open(name).step
    assert code == 128 + number and "Traceback" not in output and 6 <= step < 24
    assert output.endswith(
        f"gear: run '{name}' is saved at step {step} of 24. The same command goes on from there.\n"
    )
    main(["train", name, *OPTIONS])
    assert_same_run(tiny / name, tiny_runs / name)


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back():
    handlers_before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        Interrupted, match="stopped at once: the same command goes on from the last checkpoint"
    ) as stop:
        with deferred_signals() as received:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]  # none took effect
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.number == signal.SIGINT
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers_before


def test_a_signal_that_the_caller_does_not_check_takes_its_usual_effect():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with deferred_signals():
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_leaves_signals_alone():
    observed = []

    def train():
        with deferred_signals() as received:
            observed.append((received, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert observed == [([], before)]


SAVES_ON_SIGTERM = """
import signal, sys, time
def save(number, frame):
    open(sys.argv[1] + '.saved', 'w').close()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent receives it
open(sys.argv[1] + '.started', 'w').close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_to_the_parent_of_several_runs_reaches_them_and_waits_for_them(
    number, home, monkeypatch, capsys
):
    def start(command):
        name = command[1]
        log = open(home / f"{name}.log", "w+b")
        return subprocess.Popen(
            [sys.executable, "-S", "-c", SAVES_ON_SIGTERM, name], cwd=home, stderr=log
        ), log

    def tell():
        while len(list(home.glob("*.started"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(jobs, "_start", start)
    threading.Thread(target=tell).start()
    message = mistake(capsys, "train", "tiny", "scenes-tokenizer", "--jobs", 2, code=128 + number)
    assert {p.name for p in home.glob("*.saved")} == {
        "tiny-tokenizer.saved",
        "scenes-tokenizer.saved",
    }
    assert (
        "'tiny-tokenizer' stands at step 0, 'scenes-tokenizer' stands at step 0. The same command "
        "goes on" in message
    )
    assert "failed" not in message and not (home / "tiny-joint.started").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sender", ("terminal", "parent"))
def test_several_runs_are_saved_and_go_on_to_the_same_bytes(sender, home, tiny_runs):
    """Ctrl-C in a terminal reaches the parent and its runs; `kill` reaches the parent alone."""
    command = [
        sys.executable,
        "-m",
        "gear",
        "train",
        "tiny-tokenizer",
        "tiny-joint",
        "--jobs",
        "2",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = home / "runs" / "tiny-tokenizer"
    while not (first / "checkpoints" / "0000006").exists():
        assert process.poll() is None
        time.sleep(0.01)
    if sender == "terminal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    output = process.communicate()[1]
    assert (
        process.returncode == (130 if sender == "terminal" else 143) and "Traceback" not in output
    )
    assert (
        f"'tiny-tokenizer' stands at step {Run.open('tiny-tokenizer').step}. The same command goes "
        "on" in output
    )
    assert not (first.parent / "tiny-joint").exists()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("tiny-tokenizer", "tiny-joint"):
        assert_same_run(first.parent / name, tiny_runs / name)


@pytest.mark.slow
def test_interrupting_a_notebook_saves_and_running_the_cell_again_goes_on(home, tiny_runs):
    manager, client = jupyter_client.manager.start_new_kernel()
    try:
        client.execute(
            (
                "from gear.experiments.recipes import recipe\nfrom gear.training.loop import "
                "Runtime, train"
            ),
            reply=True,
            timeout=300,
        )
        cell = (
            "train(recipe('tiny-tokenizer'), runtime=Runtime(device='cpu', quiet=True, threads=1))"
        )
        message = client.execute(cell)
        while not (home / "runs" / "tiny-tokenizer" / "checkpoints" / "0000006").exists():
            time.sleep(0.01)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=300)
        assert (
            reply["parent_header"]["msg_id"] == message
            and reply["content"]["ename"] == "Interrupted"
        )
        step = Run.open("tiny-tokenizer").step
        assert (
            f"run 'tiny-tokenizer' is saved at step {step} of 24" in reply["content"]["evalue"]
            and step < 24
        )
        assert client.execute(cell, reply=True, timeout=300)["content"]["status"] == "ok"
    finally:
        manager.shutdown_kernel(now=True)
    assert_same_run(home / "runs" / "tiny-tokenizer", tiny_runs / "tiny-tokenizer")


# -- two processes on one run ----------------------------------------------------------------------


def test_a_run_is_trained_by_one_process_and_kill_9_releases_it(
    tiny, tiny_runs, background, capsys
):
    run = tiny / "tiny-tokenizer"
    shutil.rmtree(run)
    process = background("train", "tiny-tokenizer", *OPTIONS)
    process.wait_for(run / "checkpoints" / "0000006")
    os.kill(process.pid, signal.SIGSTOP)  # the stopped process still holds its lock
    before = fingerprint(run)
    message = mistake(capsys, "train", "tiny-tokenizer", *OPTIONS)
    assert (
        f"run 'tiny-tokenizer' is being trained by process {process.pid}. Wait for it, or stop it"
        in message
    )
    assert fingerprint(run) == before
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with exclusive(Run.open("tiny-tokenizer")):
        assert (run / "lock").read_text() == str(os.getpid())
    assert fingerprint(run) == before | {(run / "lock").relative_to(run): b""}


def test_whoever_waits_for_a_run_gets_it_when_it_is_free(tiny, capsys):
    run, entries = Run.open("tiny"), []

    def enter():
        with exclusive(run, wait=True):
            entries.append((run.path / "lock").read_text())

    thread = threading.Thread(target=enter)
    with exclusive(run):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not entries
    thread.join(60)
    assert entries == [str(os.getpid())]
    assert (
        f"run 'tiny' is being trained by process {os.getpid()}: waiting for it"
        in capsys.readouterr().err
    )


# -- a full disk -----------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_same_command_goes_on(
    tiny, tiny_runs, capsys
):
    """The disk is full first when a checkpoint is written, which grows once the discriminator's
    optimizer has moments, and then when a line of metrics is written.
    """
    run = tiny / "tiny-tokenizer"
    full_size = (run / "checkpoints" / "0000024" / "optimizers.safetensors").stat().st_size
    shutil.rmtree(run)
    with disk_of(full_size - 1):
        message = mistake(capsys, "train", "tiny-tokenizer", *OPTIONS, code=1)
    assert "run 'tiny-tokenizer' stopped at step 18:" in message and "File too large" in message
    assert (
        f"The state of step 12 is saved in {run / 'checkpoints'}." in message
        and "the same command then goes on" in message
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["0000006", "0000012"]
    checkpoints = fingerprint(run / "checkpoints")
    logged = [
        line
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] <= 12
    ]
    (run / "checkpoints" / ".0000018.tmp").mkdir()  # as left by kill -9
    with disk_of(sum(len(line) + 1 for line in logged) + 10):
        message = mistake(capsys, "train", "tiny-tokenizer", *OPTIONS, code=1)
    assert (
        "stopped at step 13: [Errno 27] File too large" in message
        and "The state of step 12 is saved" in message
    )
    assert (
        fingerprint(run / "checkpoints") == checkpoints
        and not (run / "checkpoints" / ".0000018.tmp").exists()
    )
    main(["train", "tiny-tokenizer", *OPTIONS])
    assert_same_run(run, tiny_runs / "tiny-tokenizer")
