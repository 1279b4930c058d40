"""Training in several processes: the rows of the batch that each process takes, means over the
processes, and which process writes. They communicate through Lightning Fabric.
"""

import atexit
import gc
import os
from datetime import timedelta

import torch

from gear.config import UserError
from gear.training import fsdp

TIMEOUT = timedelta(hours=2)  # the others wait this long while one process validates or saves


def world_size():
    """Return the number of processes that torchrun started, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Processes:
    """The processes that `torchrun --nproc-per-node N -m gear train ...` started, or a single
    process.

    Every process computes the gradient of its own rows of the batch, and the optimizers step along
    the mean gradient. With `shard`, a generator's blocks are sharded over the processes. Raises
    UserError if the batch cannot be divided evenly, if `shard` is set for a single process, and if
    Fabric is not installed.
    """

    def __init__(self, device, batch_size, parts=1, shard=False):
        self.rank, self.world = int(os.environ.get("RANK", 0)), world_size()
        if batch_size % (self.world * parts):
            raise UserError(
                f"a batch of {batch_size} images cannot be divided evenly among {self.world} "
                f"process{'es' * (self.world > 1)} with {parts} micro-batches each: change "
                "--accumulate, the number of processes or batch_size."
            )
        if shard and self.world == 1:
            raise UserError(
                "--fsdp spreads a generator that is too large for one GPU over several processes, "
                "but only one process runs. Start several: "
                "torchrun --nproc-per-node 2 -m gear train NAME --fsdp, or leave out --fsdp."
            )
        self.share = batch_size // self.world  # images of a batch that one process takes
        self.shard = shard
        if self.world > 1:
            self.fabric = _fabric(device, self.world)
            device = self.fabric.device
        self.device = device

    @property
    def main(self):
        """Whether this process is the one that writes files."""
        return self.rank == 0

    @property
    def measures(self):
        """Whether this process runs validation: the one that writes, or with shards every process,
        because all of them are needed to run the network.
        """
        return self.main or self.shard

    def rows(self, part=0, parts=1):
        """Return the slice of the full batch that is micro-batch `part` of this process's rows."""
        size = self.share // parts
        return slice(
            self.rank * self.share + part * size, self.rank * self.share + (part + 1) * size
        )

    def mean(self, tensor):
        """Return the mean of a tensor over the processes."""
        return tensor if self.world == 1 else self.fabric.all_reduce(tensor, reduce_op="mean")

    def average(self, tensors):
        """Replace each of `tensors` by its mean over the processes, in one exchange.

        Shards are left alone: FSDP has averaged their gradients already.
        """
        tensors = [t for t in tensors if not fsdp.is_shard(t)]
        if self.world > 1 and tensors:
            flat = self.mean(torch.cat([t.flatten() for t in tensors]))
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
                tensor.copy_(mean.view_as(tensor))

    def gather(self, tensors):
        """Return full tensors {name: tensor} to the process that writes, and {} to the others.

        Tensors that were shards are returned on the CPU. Every process has to call this.
        """
        gathered = {}
        for name, tensor in tensors.items():  # one by one, as a device may not hold all of them
            full_tensor = fsdp.full_tensor(tensor)
            if self.main:
                gathered[name] = full_tensor.cpu() if fsdp.is_shard(tensor) else tensor
        return gathered

    def any(self, flag):
        """Tell whether `flag` is true in any of the processes."""
        return bool(
            self.world == 1
            and flag
            or self.world > 1
            and self.mean(torch.tensor(float(bool(flag)))) > 0
        )

    def wait(self):
        """Wait until all processes have reached this call."""
        if self.world > 1:
            self.fabric.barrier()


def _fabric(device, world):
    """Return a Fabric that has joined this process to the other `world` - 1 processes."""
    try:
        import lightning_fabric
        import lightning_fabric.strategies
    except ImportError:
        raise UserError("several processes need Fabric: pip install lightning-fabric") from None
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if device.type == "cuda" and num_local > torch.cuda.device_count():
        raise UserError(
            f"{num_local} processes for {torch.cuda.device_count()} GPUs: start one process per "
            "GPU, or give --device cpu."
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    strategy = lightning_fabric.strategies.DDPStrategy(
        process_group_backend=backend, timeout=TIMEOUT
    )
    fabric = lightning_fabric.Fabric(
        accelerator=device.type,
        devices=num_local,
        num_nodes=world // num_local,
        strategy=strategy,
    )
    fabric.launch()
    atexit.register(_close)
    return fabric


def _close():
    """Close the connections before the interpreter exits, because gloo's threads sometimes abort a
    process that exits with open connections.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # FSDP's reference cycles keep the process group alive
