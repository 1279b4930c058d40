"""The one loop of every stage: restore, batch, updates, log, evaluate, save."""

import itertools
import signal
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gear import data
from gear.config import (
    Checked,
    Count,
    Interrupted,
    Parallel,
    UserError,
    Whole,
    __version__,
    from_dict,
    given_by,
    require,
    to_dict,
)
from gear.data.stream import upload
from gear.data.trained import note
from gear.device import open_device
from gear.evaluation.lpips import LPIPS_BACKBONE, lpips_backbone
from gear.files import check_writable, write_atomically
from gear.runs.folder import run_path
from gear.runs.run import Run
from gear.training.cached import Cached
from gear.training.guard import check_metrics, guarded, warn_of_collapse
from gear.training.processes import Processes
from gear.training.progress import Meter, Progress
from gear.training.running import Ahead, Running, way_of
from gear.training.settings import Config
from gear.training.state import State, step_seed
from gear.training.validate import Validation


@dataclass(frozen=True)
class Runtime(Checked):
    """How a run is executed, which does not change what it computes."""

    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one
    workers: Parallel = 0  # processes that prepare images; 0: this one does
    threads: Parallel = 0  # CPU threads of torch; 0 leaves it as it is
    quiet: bool = False  # no progress bar
    # parts of a batch, one after another: less memory, the same step;
    accumulate: Count | Literal["auto"] = 1
    # "auto": as few as fit on the GPU, reckoned without checkpointing
    checkpointing: bool = False  # compute activations again in backward: less memory, more time
    # compile the networks, also on a CPU and where they are small (torch.compile)
    compile: bool = False
    eager: bool = False  # neither compile nor graph a step, as is done on a GPU
    keep: Count = 2  # newest checkpoints that are kept, besides the best
    # steps in a row with a loss or gradient that is not finite which are left out before training
    # stops
    skip: Whole = 0
    tensorboard: bool = False  # the lines of metrics.jsonl for TensorBoard, too
    # look up codes and teacher features in the stage `generator`, computed once: see
    # training.cached
    cached: bool = False
    # spread the generator's blocks over the processes that torchrun started: less memory, the same
    # step
    fsdp: bool = False


def _tell_batch_norm(config, processes, parts, runtime):
    """Say where a discriminator's BatchNorm sees less than the batch, which changes the step."""
    is_split = parts > 1 or (processes.world > 1 and processes.device.type == "cpu")
    if is_split and config.trains("discriminator") and config.objective.disc_norm == "batch":
        if processes.main and not runtime.quiet:
            print(
                "the discriminator's BatchNorm sees each part of a batch alone, not the whole: "
                "--disc-norm group does not depend on it.",
                file=sys.stderr,
            )


def train(config, name=None, runtime=Runtime(), wait=False):
    """Train the run `name` (by default called as its recipe) to its last step, from its newest
    checkpoint if it has one.

    Where another process trains it that is an error, or with `wait` its end is awaited. Returns the
    Run. Parents must exist (see recipes.train_with_parents). Raises UserError for a configuration
    that cannot be, before anything is written, TrainingStopped when a loss is not finite or a file
    cannot be written, and Interrupted after SIGINT or SIGTERM, once the step is saved; the last
    checkpoint then stands. For `accumulate` "auto" recipes.in_parts finds the number before.
    """
    device = open_device(runtime.device, config.precision)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    run = Run(run_path(name or config.recipe))
    if is_trained(run, config):
        return run
    check_writable(run.path, "GEAR_RUNS")
    parts = runtime.accumulate
    require(
        parts != "auto", "accumulate is 'auto': `train_with_parents` finds the number; give one."
    )
    processes = Processes(device, config.batch_size, parts, runtime.fsdp)
    _tell_batch_norm(config, processes, parts, runtime)
    is_alone = parts == processes.world == 1
    torch.manual_seed(step_seed(config.seed, -1))
    state = State(config, processes.device, parts, processes, runtime.checkpointing)
    meter = Meter(processes)
    source = data.Source(config.data)
    validation = Validation(state, source)
    if not run.checkpoint_steps():
        state.start(source)
    compute = Running(state, way_of(config, processes.device, runtime, is_alone))
    # this process alone trains the run, or it and its like
    with guarded(run, state, wait) as signals:
        if is_trained(run, config):
            return run
        _begin(run, state, meter, validation, source)
        looked_up = runtime.cached and config.uses("tokenizer") and not config.trains("tokenizer")
        samples = None
        if looked_up:
            samples = Cached(state, runtime.workers, runtime.quiet, signals, source)
        start, rows = state.step * config.batch_size, processes.rows()
        stream = data.stream(
            source, config.seed, config.batch_size, start, runtime.workers, rows, samples
        )
        with Progress(run, config, state.step, runtime.quiet or not processes.main) as progress:
            remaining = itertools.islice(stream, config.steps - state.step)
            uploaded = (upload(samples, state.device) for samples in remaining)
            samples = Ahead(uploaded)
            while state.step < config.steps:
                # a resumed run equals an uninterrupted one
                torch.manual_seed(step_seed(config.seed, state.step))
                compute(samples.take())  # `gradients`: forward and backward of every update
                if not signals:
                    samples.fetch()  # the next step's, while the device computes
                losses = _descend(state, runtime.skip)  # clip, step: every network
                state.finish_step()  # EMA, counter
                meter.add(losses)
                progress.advance(losses)
                _record(run, state, meter, validation, progress, runtime)
                if processes.any(signals):
                    _save(run, state, meter, validation, runtime.keep)
                    saved = f"run '{run.name}' is saved at step {state.step} of {config.steps}"
                    raise Interrupted(
                        f"{saved}. The same command goes on from there.",
                        (signals or [signal.SIGTERM])[0],
                    )
    return run


def _descend(state, skip):
    """Take the step; one that is not finite is left out, `skip` of them in a row at most."""
    try:
        losses = state.descend()
        state.skipped = 0
        return losses
    except FloatingPointError as error:
        state.skipped += 1
        if state.skipped > skip:
            raise
        print(f"skipped: {error}", file=sys.stderr)
        # a line in the log, as for any step
        return {"skipped": torch.ones((), device=state.device)}


def _begin(run, state, meter, validation, source):
    """Go on from the run's newest checkpoint, or begin it; what does not fit is found before
    anything is dropped.
    """
    config = state.config
    if run.checkpoint_steps():
        saved = state.restore(run)
        meter.restore(saved["meter"])
        state.skipped = saved.get("skipped", 0)
        data.check_classes(
            config.data, validation.classes, saved.get("classes", validation.classes)
        )
        check_metrics(run, state.step, config.log_every)
        _check_lpips(run, state)
        state.processes.wait()
        if state.processes.main:
            run.rewind(state.step)
    elif state.processes.measures:
        if state.processes.main:
            Run.create(run.name, to_dict(config) | {"version": __version__})
            note(run, source)
            run.rewind(-1)
        record = validation()
        if state.processes.main:
            run.append({"step": 0, **_lpips_in_force(state), **record})
    state.processes.wait()


def is_trained(run, config):
    """Say whether nothing is left to do for a run; raises UserError if it exists with another
    configuration.
    """
    if not run.exists:
        return False
    config = _as_it_began(run, config)
    before = run.config.get("generator", {}).get("num_classes", config.generator.num_classes)
    # the folder has changed
    if before != config.generator.num_classes and run.config.get("data") == to_dict(config.data):
        data.check_classes(config.data, data.open_source(config.data, "train").classes, before)
    run.check_config(to_dict(config), complete=lambda values: to_dict(from_dict(Config, values)))
    return run.is_finished


def _as_it_began(run, config):
    """Return a Config whose data are called as in the run's own, if they are the same images in
    another place.
    """
    began = from_dict(data.DataConfig, run.config.get("data", {}))
    if replace(config.data, source=began.source, labels=began.labels) != began:
        return config
    if config.data != began:
        with given_by("--source"):
            data.trained_on(run, config.data.source, config.data.labels)
    return replace(config, data=began)


def _record(run, state, meter, validation, progress, runtime):
    """Log, evaluate, draw and save, whichever is due at this step; what is logged is on disk before
    its checkpoint.
    """
    config, step = state.config, state.step
    last = step == config.steps
    due = lambda every: last or step % every == 0  # noqa: E731
    record = meter.read() if due(config.log_every) else {}
    if due(config.eval_every) and state.processes.measures:
        record |= validation()
    if record and state.processes.main:
        warn_of_collapse(run, config, record, step)
        run.append({"step": step, **record})
        progress.log(record if runtime.tensorboard else None)
    if due(config.save_every):
        drawn = state.processes.measures and (last or state.generator is not None)
        panel = validation.panel() if drawn else None
        if panel is not None and state.processes.main:
            write_atomically(
                run.path / "samples" / f"{step:07d}.png",
                lambda path: panel.save(path, "PNG", optimize=True),
            )
        _save(run, state, meter, validation, runtime.keep)


def _save(run, state, meter, validation, keep):
    """Save a checkpoint of this step, unless there is one; the other processes wait for the one
    that writes.
    """
    saved = {"step": state.step, "meter": meter.state(), "skipped": state.skipped}
    if state.processes.any(state.processes.main and state.step not in run.checkpoint_steps()):
        tensors = state.tensors()
        if state.processes.main:
            saved |= {"config": run.config_hash, "classes": validation.classes}
            run.save_checkpoint(state.step, tensors, saved, keep)
    state.processes.wait()


def _lpips_in_force(state):
    """Return the perceptual weight in force: 0 where LPIPS has no weights on this machine, and then
    say so.
    """
    wanted = state.config.objective.lpips_weight
    if state.discriminator is None:
        return {}
    if wanted > 0 and state.lpips is None:
        print(
            f"LPIPS has no VGG16 weights on this machine ({lpips_backbone()}): "
            f"lpips_weight is 0 in this run instead of {wanted}.",
            file=sys.stderr,
        )
    return {"lpips_weight": wanted if state.lpips is not None else 0.0}


def _check_lpips(run, state):
    """Raise UserError if resuming would change the objective: LPIPS weights came or went since the
    run began.
    """
    began, now = (
        run.metrics().iloc[0].get("lpips_weight"),
        _lpips_in_force(state).get("lpips_weight"),
    )
    if now is not None and began != now:
        raise UserError(
            f"run '{run.name}' began with a perceptual weight of {began} and would go on with "
            f"{now}: LPIPS's VGG16 weights "
            f"({LPIPS_BACKBONE} in torch's cache) came or went. Restore that, or start another run "
            "(--name)."
        )
