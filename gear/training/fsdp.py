"""A network sharded over several processes (FSDP2): conversion between full tensors and shards."""


def shard_blocks(blocks, device, processes):
    """Shard every block over `processes` processes, in place; its parameters become DTensors.

    `blocks` is a module that contains the blocks and calls them in turn. Each block is gathered
    just before it runs, in the forward and the backward pass, while the previous one computes.
    After the backward pass, .grad holds this process's shard of the mean gradient over processes.
    """
    import torch.distributed.fsdp  # takes 0.6 s, and a single process does not need it

    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes,))
    for block in (*blocks, blocks):
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)


def is_shard(tensor):
    """Tell whether `tensor` is sharded over the processes."""
    # a DTensor is recognised by this method, because importing its class takes 0.6 s
    return hasattr(tensor, "full_tensor")


def local_tensor(tensor):
    """Return the part of a tensor that this process holds, to be changed in place."""
    return tensor.to_local() if is_shard(tensor) else tensor


def full_tensor(tensor):
    """Return the full tensor; for a shard, every process has to call this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def shard_like(tensor, reference):
    """Return this process's shard of a full `tensor`, placed as the shard `reference`; return
    `tensor` itself if `reference` is no shard.

    No communication takes place: every process passes the same full tensor.
    """
    if not is_shard(reference):
        return tensor
    import torch.distributed.tensor

    return torch.distributed.tensor.distribute_tensor(
        tensor, reference.device_mesh, reference.placements, src_data_rank=None
    )
