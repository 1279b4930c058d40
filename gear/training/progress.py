"""Progress of a run while it trains: mean losses, a progress bar, images per second."""

import sys
import time

import torch
from tqdm import tqdm  # not tqdm.auto, which freezes under papermill

from gear.config import UserError

SHOWN = ("recon_loss", "ntp_loss", "align_loss", "soft_align_loss", "shape_loss")


class Meter:
    """Mean losses since the last logged line.

    The sums stay on the device until they are read, and are saved with each checkpoint.
    """

    def __init__(self, processes):
        self.processes = processes
        self.sums = {}
        self.counts = {}

    def add(self, losses):
        """Add the losses of one step, {name: scalar tensor}."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self):
        """Return the means {name: float} since the last call, and start again from zero."""
        sums = self._totals()
        means = {name: total / self.counts[name] for name, total in sums.items()}
        self.sums = {}
        self.counts = {}
        return means

    def _totals(self):
        """Return the sums, averaged over the processes: {name: float}."""
        totals = (
            self.processes.mean(torch.stack([*self.sums.values()])).tolist() if self.sums else []
        )
        return dict(zip(self.sums, totals))

    def state(self):
        return {"sums": self._totals(), "counts": self.counts}

    def restore(self, saved):
        device = self.processes.device
        self.sums = {
            k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in saved["sums"].items()
        }
        self.counts = saved["counts"]


class Progress:
    """A progress bar with losses, images/s and time left; the speed is also logged to
    timing.jsonl.
    """

    def __init__(self, run, config, step, quiet):
        self.run = run
        self.batch = config.batch_size
        self.step = step
        self.bar = tqdm(
            total=config.steps * config.batch_size,
            initial=step * config.batch_size,
            desc=run.name,
            unit=" images",
            disable=quiet,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )
        self.last_shown = 0.0
        self.writer = None  # of TensorBoard, opened when first needed
        self._restart_timer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _restart_timer(self):
        self.start_time = time.perf_counter()
        self.num_images = 0

    def advance(self, losses):
        """Count one step, and show its losses at most once per second."""
        self.step += 1
        self.num_images += self.batch
        self.bar.update(self.batch)
        if not self.bar.disable and time.perf_counter() - self.last_shown > 1:
            self.last_shown = time.perf_counter()
            postfix = {
                k.removesuffix("_loss"): f"{float(v):.3f}" for k, v in losses.items() if k in SHOWN
            }
            self.bar.set_postfix(postfix, refresh=False)

    def log(self, record=None):
        """Append the speed since the last call to timing.jsonl, and write `record`, if given, for
        TensorBoard.
        """
        if record is not None:
            self.writer = self.writer or _summary_writer(self.run, self.step)
            for name, value in record.items():
                self.writer.add_scalar(name, value, self.step)
        seconds = time.perf_counter() - self.start_time
        timing = {
            "step": self.step,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 1),
        }
        self.run.append(timing, "timing.jsonl")
        self._restart_timer()


def _summary_writer(run, step):
    try:
        import torch.utils.tensorboard as tensorboard
    except ImportError:
        raise UserError(
            "--tensorboard needs a package that is not installed: pip install tensorboard"
        ) from None
    return tensorboard.SummaryWriter(run.path / "tensorboard", purge_step=step)
