"""Several processes as one: whose rows of a batch are whose, means over all, who writes. Fabric does the talking."""

import os
from datetime import timedelta

import torch

from gear.config import UserError

PATIENCE = timedelta(hours=2)  # for a process that validates or saves while the others wait


class Processes:
    """The processes that `torchrun --nproc-per-node N -m gear train ...` started, or this one alone.

    Every process computes the gradient of its own rows of the batch; what is stepped is the mean. Raises UserError for a
    batch that cannot be shared out evenly, and where Fabric is missing.
    """

    def __init__(self, device, batch_size, parts=1):
        self.rank, self.world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if batch_size % (self.world * parts):
            raise UserError(
                f"a batch of {batch_size} images cannot be shared out evenly to {self.world} processes of {parts} parts each: "
                f"change --accumulate or the number of processes, or batch_size."
            )
        self.share = batch_size // self.world
        if self.world > 1:
            self.fabric = _fabric(device, self.world)
            device = self.fabric.device
        self.device = device

    @property
    def main(self):
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, part=0, parts=1):
        """Return the slice of the whole batch that is a part of this process's rows."""
        size = self.share // parts
        return slice(self.rank * self.share + part * size, self.rank * self.share + (part + 1) * size)

    def mean(self, tensor):
        """Return the mean of a tensor over the processes."""
        return tensor if self.world == 1 else self.fabric.all_reduce(tensor, reduce_op="mean")

    def average(self, tensors):
        """Replace each of `tensors` by its mean over the processes, in one exchange."""
        if self.world > 1 and tensors:
            flat = self.mean(torch.cat([t.flatten() for t in tensors]))
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
                tensor.copy_(mean.view_as(tensor))

    def any(self, flag):
        """Tell whether any of the processes has a true `flag`."""
        return bool(self.world == 1 and flag or self.world > 1 and self.mean(torch.tensor(float(bool(flag)))) > 0)

    def wait(self):
        """Wait for the others."""
        if self.world > 1:
            self.fabric.barrier()


def _fabric(device, world):
    try:
        import lightning_fabric
        import lightning_fabric.strategies
    except ImportError:
        raise UserError("several processes need Fabric: pip install lightning-fabric") from None
    here, kind = int(os.environ.get("LOCAL_WORLD_SIZE", world)), device.type
    if kind == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} processes for {torch.cuda.device_count()} GPUs: start one a GPU, or give --device cpu.")
    backend = "nccl" if kind == "cuda" else "gloo"
    strategy = lightning_fabric.strategies.DDPStrategy(process_group_backend=backend, timeout=PATIENCE)
    fabric = lightning_fabric.Fabric(accelerator=kind, devices=here, num_nodes=world // here, strategy=strategy)
    fabric.launch()
    return fabric
