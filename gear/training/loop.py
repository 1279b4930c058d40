"""The training loop, the same for every stage: restore, batch, updates, log, evaluate, save."""

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
    """How a run is executed. None of this changes what the run computes."""

    device: str = "auto"  # "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one
    workers: Parallel = 0  # processes that prepare images; 0: the training process does
    threads: Parallel = 0  # CPU threads of torch; 0: torch's default
    quiet: bool = False  # show no progress bar
    # micro-batches that a batch is split into: less memory, the same step. "auto": as few as fit
    # on the GPU, computed without checkpointing
    accumulate: Count | Literal["auto"] = 1
    # recompute activations in the backward pass: less memory, more time
    checkpointing: bool = False
    # compile the networks (torch.compile), also on a CPU and for small steps
    compile: bool = False
    eager: bool = False  # on a GPU, neither compile a step nor capture it as a CUDA graph
    keep: Count = 2  # newest checkpoints to keep, besides the best one
    # consecutive steps with a loss or gradient that is not finite to skip before training stops
    skip: Whole = 0
    tensorboard: bool = False  # also write the metrics for TensorBoard
    # in the stage `generator`, compute codes and teacher features once and look them up afterwards
    cached: bool = False
    # shard the generator's blocks over the processes that torchrun started: less memory, the same
    # step
    fsdp: bool = False


def _warn_of_batch_norm(config, processes, parts, runtime):
    """Warn if a discriminator's BatchNorm sees less than the full batch, which changes the step."""
    is_split = parts > 1 or (processes.world > 1 and processes.device.type == "cpu")
    if is_split and config.trains("discriminator") and config.objective.disc_norm == "batch":
        if processes.main and not runtime.quiet:
            print(
                "The discriminator's BatchNorm sees each micro-batch alone, not the full batch, "
                "which changes the step. --disc-norm group does not depend on the split.",
                file=sys.stderr,
            )


def train(config, name=None, runtime=Runtime(), wait=False):
    """Train the run `name` (default: its recipe's name) to its last step; returns the Run.

    Training continues from the newest checkpoint if there is one. Parent runs must exist (see
    recipes.train_with_parents), and `accumulate` must be a number (recipes.in_parts resolves
    "auto"). With `wait`, a run that another process is training is waited for.

    Raises UserError for an invalid configuration, before anything is written, and for a run that
    another process is training; TrainingStopped when a loss is not finite or a file cannot be
    written; Interrupted after SIGINT or SIGTERM, once the current step is saved. The last
    checkpoint is kept in each case.
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
        parts != "auto",
        "accumulate is 'auto', but train() needs a number: give one, or call train_with_parents.",
    )
    processes = Processes(device, config.batch_size, parts, runtime.fsdp)
    _warn_of_batch_norm(config, processes, parts, runtime)
    is_alone = parts == processes.world == 1
    torch.manual_seed(step_seed(config.seed, -1))
    state = State(config, processes.device, parts, processes, runtime.checkpointing)
    meter = Meter(processes)
    source = data.Source(config.data)
    validation = Validation(state, source)
    if not run.checkpoint_steps():
        state.start(source)
    compute = Running(state, way_of(config, processes.device, runtime, is_alone))
    # no other process trains this run, except the processes of the same torchrun
    with guarded(run, state, wait) as signals:
        if is_trained(run, config):
            return run
        _begin(run, state, meter, validation, source)
        stream = _stream(state, source, runtime, signals)
        with Progress(run, config, state.step, runtime.quiet or not processes.main) as progress:
            remaining = itertools.islice(stream, config.steps - state.step)
            samples = Ahead(upload(batch, state.device) for batch in remaining)
            while state.step < config.steps:
                # seeded per step, so that a resumed run equals an uninterrupted one
                torch.manual_seed(step_seed(config.seed, state.step))
                compute(samples.take())  # forward and backward of every update: see `gradients`
                if not signals:
                    samples.fetch()  # the next step's samples, while the device computes
                losses = _descend(state, runtime.skip)  # clip and step every network
                state.finish_step()  # update the averages, count the step
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


def _stream(state, source, runtime, signals):
    """Return the stream of this process's samples from the state's step on."""
    config = state.config
    cached = None
    if runtime.cached and config.uses("tokenizer") and not config.trains("tokenizer"):
        cached = Cached(state, runtime.workers, runtime.quiet, signals, source)
    start = state.step * config.batch_size
    rows = state.processes.rows()
    return data.stream(source, config.seed, config.batch_size, start, runtime.workers, rows, cached)


def _descend(state, skip):
    """Take the optimizer steps; skip a step that is not finite, at most `skip` in a row."""
    try:
        losses = state.descend()
        state.skipped = 0
        return losses
    except FloatingPointError as error:
        state.skipped += 1
        if state.skipped > skip:
            raise
        print(f"skipped: {error}", file=sys.stderr)
        # a skipped step also gets its line in metrics.jsonl
        return {"skipped": torch.ones((), device=state.device)}


def _begin(run, state, meter, validation, source):
    """Restore the run's newest checkpoint, or create the run.

    Everything is checked before log lines after the checkpoint are removed.
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
    """Tell whether a run is trained to its end; raises UserError if it exists with another
    configuration.
    """
    if not run.exists:
        return False
    config = _with_original_source(run, config)
    num_classes = run.config.get("generator", {}).get("num_classes", config.generator.num_classes)
    is_same_data = run.config.get("data") == to_dict(config.data)
    # same data, other number of classes: the image folder has changed
    if num_classes != config.generator.num_classes and is_same_data:
        data.check_classes(config.data, data.open_source(config.data, "train").classes, num_classes)
    run.check_config(to_dict(config), complete=lambda values: to_dict(from_dict(Config, values)))
    return run.is_finished


def _with_original_source(run, config):
    """Return `config` with the paths of images and labels that the run was created with, if the
    images are the same and only moved.
    """
    original = from_dict(data.DataConfig, run.config.get("data", {}))
    if replace(config.data, source=original.source, labels=original.labels) != original:
        return config
    if config.data != original:
        with given_by("--source"):
            data.trained_on(run, config.data.source, config.data.labels)
    return replace(config, data=original)


def _record(run, state, meter, validation, progress, runtime):
    """Log, evaluate, draw samples and save, each if it is due at this step.

    A step's log line is on disk before its checkpoint.
    """
    config, step = state.config, state.step
    is_last = step == config.steps
    is_due = lambda every: is_last or step % every == 0  # noqa: E731
    record = meter.read() if is_due(config.log_every) else {}
    if is_due(config.eval_every) and state.processes.measures:
        record |= validation()
    if record and state.processes.main:
        warn_of_collapse(run, config, record, step)
        run.append({"step": step, **record})
        progress.log(record if runtime.tensorboard else None)
    if is_due(config.save_every):
        draws_panel = state.processes.measures and (is_last or state.generator is not None)
        panel = validation.panel() if draws_panel else None
        if panel is not None and state.processes.main:
            write_atomically(
                run.path / "samples" / f"{step:07d}.png",
                lambda path: panel.save(path, "PNG", optimize=True),
            )
        _save(run, state, meter, validation, runtime.keep)


def _save(run, state, meter, validation, keep):
    """Save a checkpoint of this step unless it exists; the other processes wait for the one that
    writes.
    """
    saved = {"step": state.step, "meter": meter.state(), "skipped": state.skipped}
    if state.processes.any(state.processes.main and state.step not in run.checkpoint_steps()):
        tensors = state.tensors()
        if state.processes.main:
            saved |= {"config": run.config_hash, "classes": validation.classes}
            run.save_checkpoint(state.step, tensors, saved, keep)
    state.processes.wait()


def _lpips_in_force(state):
    """Return {"lpips_weight": the weight in force}, or {} if the run trains no tokenizer.

    The weight is 0 if LPIPS has no weights on this machine; a message then says so.
    """
    configured = state.config.objective.lpips_weight
    if state.discriminator is None:
        return {}
    if configured > 0 and state.lpips is None:
        print(
            f"LPIPS has no VGG16 weights on this machine ({lpips_backbone()}): "
            f"lpips_weight is 0 in this run instead of {configured}.",
            file=sys.stderr,
        )
    return {"lpips_weight": configured if state.lpips is not None else 0.0}


def _check_lpips(run, state):
    """Raise UserError if resuming would change the objective, because LPIPS's weights were added
    or removed since the run began.
    """
    before = run.metrics().iloc[0].get("lpips_weight")
    now = _lpips_in_force(state).get("lpips_weight")
    if now is not None and before != now:
        raise UserError(
            f"run '{run.name}' began with a perceptual weight of {before} and would go on with "
            f"{now}: LPIPS's VGG16 weights ({LPIPS_BACKBONE} in torch's cache) were added or "
            "removed since. Undo that, or start another run (--name)."
        )
