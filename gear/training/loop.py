"""The one loop of every stage: restore, batch, updates, log, evaluate, save."""

import sys
import time
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm  # the plain one: tqdm.auto freezes under papermill

from gear import data
from gear.config import Interrupted, UserError, __version__, from_dict, to_dict
from gear.evaluation.reconstruction import LPIPS_BACKBONE, lpips_backbone
from gear.generator.sampling import sample
from gear.home import check_writable, write_atomically
from gear.run import PANEL_GAP, PANEL_WIDTH, Run, run_path
from gear.training.cached import Cached
from gear.training.guard import check_metrics, guarded
from gear.training.objectives import STAGES
from gear.training.state import Config, State
from gear.training.validate import BATCH, generator_metrics, tokenizer_metrics


@dataclass(frozen=True)
class Runtime:
    """How a run is executed, which does not change what it computes."""

    device: str = "auto"  # "cpu", "cuda", or "auto": the GPU if there is one
    workers: int = 0  # processes that prepare images
    threads: int = 0  # CPU threads of torch; 0 leaves it as it is
    quiet: bool = False  # no progress bar
    rebuild: bool = False  # train again a finished run that came without its weights
    cached: bool = False  # look up codes and teacher features in the stage `generator`, computed once: see training.cached

    def __post_init__(self):
        if min(self.workers, self.threads) < 0:
            raise UserError(f"workers are {self.workers} and threads {self.threads}: neither can be negative.")


def train(config, name=None, runtime=Runtime()):
    """Train the run `name` (by default called as its recipe) to its last step, from its newest checkpoint if it has one.

    Returns the Run. Parents must exist (see recipes.train_with_parents). Raises UserError for a configuration that cannot
    be, before anything is written, TrainingStopped when a loss is not finite or a file cannot be written, and Interrupted
    after SIGINT or SIGTERM, once the step is saved; the last checkpoint then stands.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    run = Run(run_path(name or config.recipe))
    if is_trained(run, config, runtime.rebuild):
        return run
    check_writable(run.path, "GEAR_RUNS")
    reseed(config.seed, -1)
    state, meter = State(config, _device(runtime.device)), Meter()
    validation = Validation(state)
    if not run.checkpoint_steps():
        state.start()
    with guarded(run, state) as signals:  # this process alone trains the run
        if is_trained(run, config, runtime.rebuild):
            return run
        _begin(run, state, meter, validation)
        samples = (
            Cached(state, runtime.workers, runtime.quiet, signals) if runtime.cached and config.stage == "generator" else None
        )
        start = state.step * config.batch_size
        batches = data.stream(config.data, config.seed, config.batch_size, start, runtime.workers, samples)
        with Progress(run, config, state.step, runtime.quiet) as progress:
            while state.step < config.steps:
                reseed(config.seed, state.step)  # a resumed run equals an uninterrupted one
                batch, losses = state.observe(*next(batches)), {}  # one tokenizer forward, one teacher forward, shared
                for update in STAGES[config.stage]:  # joint = tokenizer, discriminator, generator
                    losses |= update(state, batch)  # loss, backward, clip, step: one network
                state.finish_step()  # EMA, counter
                meter.add(losses)
                progress.advance(losses)
                _record(run, state, meter, validation, progress)
                if signals:
                    _save(run, state, meter, validation)
                    saved = f"run '{run.name}' is saved at step {state.step} of {config.steps}"
                    raise Interrupted(f"{saved}. The same command goes on from there.", signals[0])
    return run


def _begin(run, state, meter, validation):
    """Go on from the run's newest checkpoint, or begin it; what does not fit is found before anything is dropped."""
    config = state.config
    if run.checkpoint_steps():
        saved = state.restore(run)
        meter.restore(saved["meter"])
        data.check_classes(config.data, validation.classes, saved.get("classes", validation.classes))
        check_metrics(run, state.step, config.log_every)
        _check_lpips(run, state)
        run.rewind(state.step)
    else:
        Run.create(run.name, to_dict(config) | {"version": __version__})
        run.rewind(-1)
        run.append({"step": 0, **_lpips_in_force(state), **validation()})


def is_trained(run, config, rebuild=False):
    """Say whether nothing is left to do for a run; raises UserError if it exists with another configuration.

    A finished run without weights is a record: training it would replace what is tracked, so that needs `rebuild`.
    """
    if not run.exists:
        return False
    before = run.config.get("generator", {}).get("num_classes", config.generator.num_classes)
    if before != config.generator.num_classes and run.config.get("data") == to_dict(config.data):  # the folder has changed
        data.check_classes(config.data, data.open_source(config.data, "train").classes, before)
    run.check_config(to_dict(config), complete=lambda values: to_dict(from_dict(Config, values)))
    if run.logged_step >= config.steps and not run.checkpoint_steps() and not rebuild:
        raise UserError(
            f"run '{run.name}' is tracked without its weights, and training it would replace the record in {run.path}. "
            f"Train it in another folder (export GEAR_RUNS=runs/demo), or here with --rebuild."
        )
    return run.is_finished


def reseed(seed, step):
    """Make every random draw of a step a function of (seed, step)."""
    torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)


class Meter:
    """Means of the losses since the last logged line, kept on the device until then and saved with a checkpoint."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, losses):
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self):
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self):
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "counts": self.counts}

    def restore(self, saved):
        self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in saved["sums"].items()}
        self.counts = saved["counts"]


class Validation:
    """The run's own measurements on the first `eval_images` of the validation split."""

    def __init__(self, state):
        config, self.state, self.of_tokenizer = state.config, state, None
        source = data.open_source(config.data, "val")
        self.classes = source.classes
        if "generator" in state.networks:
            data.check_classes(config.data, self.classes, config.generator.num_classes)
        images, labels = data.read(source, config.data, config.eval_images)
        self.images, self.labels = images.to(state.device), labels.to(state.device)
        teacher = state.teacher_features
        with torch.no_grad():
            self.target = None if teacher is None else torch.cat([teacher(x) for x in self.images.split(BATCH)])

    def __call__(self):
        state, config = self.state, self.state.config
        if config.stage == "teacher":
            with torch.no_grad():
                losses = state.teacher.factor_losses(self.images, self.labels)
            return {f"val/{name}": float(value) for name, value in losses.items()}
        averages = {name: average.module for name, average in state.averages.items()}
        tokenizer = averages.get("tokenizer", state.tokenizer)
        if "tokenizer" in averages or self.of_tokenizer is None:  # a frozen tokenizer is measured once
            self.of_tokenizer = tokenizer_metrics(tokenizer, self.images, config.objective.tau)
        metrics = dict(self.of_tokenizer)
        if "generator" in averages:
            projector = state.networks.get("projector")
            seen = self.images, self.labels, self.target, state.widths
            metrics |= generator_metrics(averages["generator"], projector, tokenizer, *seen)
        return metrics

    def panel(self):
        """Draw inputs, reconstructions and, with a generator, two rows of samples, a class each: an image, or None."""
        state = self.state
        if state.config.stage == "teacher":
            return None
        tokenizer = state.averages["tokenizer"].module if "tokenizer" in state.averages else state.tokenizer
        images = self.images[torch.arange(PANEL_WIDTH) % len(self.images)]
        with torch.no_grad():
            rows = [images, tokenizer(images).reconstruction]
        if "generator" in state.averages:
            generator = state.averages["generator"].module
            labels = torch.arange(2 * PANEL_WIDTH, device=state.device) % state.config.generator.num_classes
            side = state.config.data.image_size // state.config.tokenizer.downsampling
            drawn = sample(generator, tokenizer, labels, (side, side), seed=state.config.seed)
            rows.append(data.to_float(drawn))
        grid = make_grid(torch.cat(rows).clamp(-1, 1), nrow=PANEL_WIDTH, padding=PANEL_GAP, pad_value=1.0)
        return Image.fromarray(data.to_uint8(grid[None])[0].cpu().numpy())


class Progress:
    """A progress bar with loss, images/s and time left, and the same figures in timing.jsonl."""

    def __init__(self, run, config, step, quiet):
        self.run, self.batch, self.step = run, config.batch_size, step
        self.bar = tqdm(
            total=config.steps * config.batch_size, initial=step * config.batch_size, desc=run.name, unit=" images",
            disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 5.0, dynamic_ncols=True,
        )  # fmt: skip
        self.shown = 0.0
        self._mark()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def _mark(self):
        self.time, self.images = time.perf_counter(), 0

    def advance(self, losses):
        self.step += 1
        self.images += self.batch
        self.bar.update(self.batch)
        if not self.bar.disable and time.perf_counter() - self.shown > 1:
            self.shown = time.perf_counter()
            shown = {k.removesuffix("_loss"): f"{float(v):.3f}" for k, v in losses.items() if k in SHOWN}
            self.bar.set_postfix(shown, refresh=False)

    def log(self):
        seconds = time.perf_counter() - self.time
        record = {"step": self.step, "seconds": round(seconds, 3), "images_per_second": round(self.images / seconds, 1)}
        self.run.append(record, "timing.jsonl")
        self._mark()


SHOWN = ("recon_loss", "ntp_loss", "align_loss", "soft_align_loss", "shape_loss")


def _record(run, state, meter, validation, progress):
    """Log, evaluate, draw and save, whichever is due at this step; what is logged is on disk before its checkpoint."""
    config, step = state.config, state.step
    last = step == config.steps
    due = lambda every: last or step % every == 0  # noqa: E731
    record = meter.read() if due(config.log_every) else {}
    if due(config.eval_every):
        record |= validation()
    if record:
        run.append({"step": step, **record})
        progress.log()
    if due(config.save_every):
        if (last or "generator" in state.networks) and (panel := validation.panel()) is not None:
            write_atomically(run.path / "samples" / f"{step:07d}.png", lambda path: panel.save(path, "PNG", optimize=True))
        _save(run, state, meter, validation)


def _save(run, state, meter, validation):
    """Save a checkpoint of this step, unless there is one."""
    if state.step not in run.checkpoint_steps():
        saved = {"step": state.step, "meter": meter.state(), "config": run.config_hash, "classes": validation.classes}
        run.save_checkpoint(state.step, state.tensors(), saved)


def _lpips_in_force(state):
    """Return the perceptual weight in force: 0 where LPIPS has no weights on this machine, and then say so."""
    wanted = state.config.objective.lpips_weight
    if "discriminator" not in state.networks:
        return {}
    if wanted > 0 and state.lpips is None:
        print(
            f"LPIPS has no VGG16 weights on this machine ({lpips_backbone()}): "
            f"lpips_weight is 0 in this run instead of {wanted}.",
            file=sys.stderr,
        )
    return {"lpips_weight": wanted if state.lpips is not None else 0.0}


def _check_lpips(run, state):
    """Raise UserError if resuming would change the objective: LPIPS weights came or went since the run began."""
    began, now = run.metrics().iloc[0].get("lpips_weight"), _lpips_in_force(state).get("lpips_weight")
    if now is not None and began != now:
        raise UserError(
            f"run '{run.name}' began with a perceptual weight of {began} and would go on with {now}: LPIPS's VGG16 weights "
            f"({LPIPS_BACKBONE} in torch's cache) came or went. Restore that, or start another run (--name)."
        )


def _device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one type for each way
        raise UserError(f"no device '{name}' here ({str(error).splitlines()[0]}). Try --device cpu, or auto.") from None
    return device
