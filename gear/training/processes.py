"""Several processes as one: whose rows of a batch are whose, means over all, who writes. Fabric
does the talking.
"""

import atexit
import gc
import os
from datetime import timedelta

import torch

from gear.config import UserError
from gear.training import fsdp

PATIENCE = timedelta(hours=2)  # for a process that validates or saves while the others wait


def world_size():
    """Return how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Processes:
    """The processes that `torchrun --nproc-per-node N -m gear train ...` started, or this one
    alone.

    Every process computes the gradient of its own rows of the batch; what is stepped is the mean.
    With `shard` a generator's blocks are spread over them. Raises UserError for a batch that cannot
    be shared out evenly, for one process that is to shard, and where Fabric is missing.
    """

    def __init__(self, device, batch_size, parts=1, shard=False):
        self.rank, self.world = int(os.environ.get("RANK", 0)), world_size()
        if batch_size % (self.world * parts):
            raise UserError(
                f"a batch of {batch_size} images cannot be shared out evenly to {self.world} "
                f"processes of {parts} parts each: "
                f"change --accumulate or the number of processes, or batch_size."
            )
        if shard and self.world == 1:
            raise UserError(
                "--fsdp spreads a generator that is too large for one GPU over several processes, "
                "and this is one alone: "
                "torchrun --nproc-per-node 2 -m gear train NAME --fsdp, or leave it out."
            )
        self.share, self.shard = batch_size // self.world, shard
        if self.world > 1:
            self.fabric = _fabric(device, self.world)
            device = self.fabric.device
        self.device = device

    @property
    def main(self):
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def measures(self):
        """Whether this process runs validation: the one that writes; all, where it takes all of
        them to run a network.
        """
        return self.main or self.shard

    def rows(self, part=0, parts=1):
        """Return the slice of the whole batch that is a part of this process's rows."""
        size = self.share // parts
        return slice(
            self.rank * self.share + part * size, self.rank * self.share + (part + 1) * size
        )

    def mean(self, tensor):
        """Return the mean of a tensor over the processes."""
        return tensor if self.world == 1 else self.fabric.all_reduce(tensor, reduce_op="mean")

    def average(self, tensors):
        """Replace each of `tensors` by its mean over the processes, in one exchange; shards of
        gradients are means already.
        """
        tensors = [t for t in tensors if not fsdp.is_shard(t)]
        if self.world > 1 and tensors:
            flat = self.mean(torch.cat([t.flatten() for t in tensors]))
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
                tensor.copy_(mean.view_as(tensor))

    def gather(self, tensors):
        """Return {name: tensor}, whole, to the process that writes, shards on its CPU; every
        process has to ask.
        """
        gathered = {}
        for name, tensor in tensors.items():  # one at a time: no device has room for all of them
            whole = fsdp.whole(tensor)
            if self.main:
                gathered[name] = whole.cpu() if fsdp.is_shard(tensor) else tensor
        return gathered

    def any(self, flag):
        """Tell whether any of the processes has a true `flag`."""
        return bool(
            self.world == 1
            and flag
            or self.world > 1
            and self.mean(torch.tensor(float(bool(flag)))) > 0
        )

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
        raise UserError(
            f"{here} processes for {torch.cuda.device_count()} GPUs: start one a GPU, or give "
            "--device cpu."
        )
    backend = "nccl" if kind == "cuda" else "gloo"
    strategy = lightning_fabric.strategies.DDPStrategy(
        process_group_backend=backend, timeout=PATIENCE
    )
    fabric = lightning_fabric.Fabric(
        accelerator=kind, devices=here, num_nodes=world // here, strategy=strategy
    )
    fabric.launch()
    atexit.register(_leave)
    return fabric


def _leave():
    """Close the connections while the interpreter stands: gloo's threads now and then abort a
    process that exits with them.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # FSDP's cycles hold the group
