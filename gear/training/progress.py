"""What a run tells while it trains: means of its losses, a progress bar, images a second."""

import sys
import time

import torch
from tqdm import tqdm  # the plain one: tqdm.auto freezes under papermill

from gear.config import UserError

SHOWN = ("recon_loss", "ntp_loss", "align_loss", "soft_align_loss", "shape_loss")


class Meter:
    """Means of the losses since the last logged line, kept on the device until then and saved with
    a checkpoint.
    """

    def __init__(self, processes):
        self.processes, self.sums, self.counts = processes, {}, {}

    def add(self, losses):
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self):
        sums = self._totals()
        means = {name: total / self.counts[name] for name, total in sums.items()}
        self.sums, self.counts = {}, {}
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
    """A progress bar with loss, images/s and time left, and the same figures in timing.jsonl."""

    def __init__(self, run, config, step, quiet):
        self.run, self.batch, self.step = run, config.batch_size, step
        self.bar = tqdm(
            total=config.steps * config.batch_size,
            initial=step * config.batch_size,
            desc=run.name,
            unit=" images",
            disable=quiet,
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )
        self.shown, self.board = 0.0, None
        self._mark()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _mark(self):
        self.time, self.images = time.perf_counter(), 0

    def advance(self, losses):
        self.step += 1
        self.images += self.batch
        self.bar.update(self.batch)
        if not self.bar.disable and time.perf_counter() - self.shown > 1:
            self.shown = time.perf_counter()
            shown = {
                k.removesuffix("_loss"): f"{float(v):.3f}" for k, v in losses.items() if k in SHOWN
            }
            self.bar.set_postfix(shown, refresh=False)

    def log(self, record=None):
        """Note the speed since the last time in timing.jsonl, and `record` for TensorBoard, where
        there is one.
        """
        if record is not None:
            self.board = self.board or _board(self.run, self.step)
            for name, value in record.items():
                self.board.add_scalar(name, value, self.step)
        seconds = time.perf_counter() - self.time
        record = {
            "step": self.step,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.images / seconds, 1),
        }
        self.run.append(record, "timing.jsonl")
        self._mark()


def _board(run, step):
    try:
        import torch.utils.tensorboard as tensorboard
    except ImportError:
        raise UserError(
            "--tensorboard needs a package that is not installed: pip install tensorboard"
        ) from None
    return tensorboard.SummaryWriter(run.path / "tensorboard", purge_step=step)
