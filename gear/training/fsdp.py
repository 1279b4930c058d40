"""A network spread over several processes (FSDP2): from a whole tensor to the shard that lies here,
and back.
"""


def spread(blocks, device, processes):
    """Leave a shard of every block on each of so many `processes`, in place; parameters are
    DTensors from here on.

    `blocks` is a sequence of modules that is itself called: it gathers a block just before that
    runs, forward and backward, the next one meanwhile, and leaves in .grad this process's shard of
    the mean gradient over the processes.
    """
    import torch.distributed.fsdp  # .6 s, for which one process has no use

    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes,))
    for block in (*blocks, blocks):
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)


def is_shard(tensor):
    """Tell whether `tensor` is spread over the processes."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class takes .6 s to import


def local(tensor):
    """Return what lies here of a tensor, to be changed in place."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor):
    """Return the whole of a tensor; for a shard every process has to ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def spread_like(tensor, other):
    """Return the shard of a whole `tensor` that belongs here where `other` is one, without asking;
    else `tensor`.
    """
    if not is_shard(other):
        return tensor
    import torch.distributed.tensor

    return torch.distributed.tensor.distribute_tensor(
        tensor, other.device_mesh, other.placements, src_data_rank=None
    )
