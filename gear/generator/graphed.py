"""A function of many small kernels as one CUDA graph: the host launches it once.

A function is called as function(settings, network, *inputs, rng) and returns tensors. `settings`
are hashable; `inputs` are tensors on one device, or None; random numbers come from `rng` alone.
"""

import copy
import weakref

import torch

from gear.device import capturing
from gear.files import say_once

# network -> (kind of its last call, its Graph; None: not yet captured, False: cannot be)
_LAST = weakref.WeakKeyDictionary()


class Graph:
    """`function` captured with copies of `network`, in `dtype`, and `inputs`; raises RuntimeError.

    A replay runs the captured kernels on the same memory: parameters and inputs are copied there
    before it, and what the function returns is copied from there.
    """

    def __init__(self, function, settings, network, dtype, inputs):
        self.network = copy.deepcopy(network).to(dtype)
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        device = inputs[0].device
        self.rng, self.graph = torch.Generator(device), torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.rng)  # else every replay would draw the same
        with capturing(self.graph, device):
            self.outputs = function(settings, self.network, *self.inputs, self.rng)

    def __call__(self, network, inputs, seed):
        torch._foreach_copy_(list(self.network.parameters()), list(network.parameters()))
        for mine, theirs in zip(self.inputs, inputs):
            if mine is not None:
                mine.copy_(theirs)
        self.rng.manual_seed(seed)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]


def launched(function, settings, network, dtype, inputs, seed):
    """Return what `function` does with a network in `dtype`, its kernels launched one by one."""
    if dtype != next(network.parameters()).dtype:
        network = copy.deepcopy(network).to(dtype)
    return function(settings, network, *inputs, torch.Generator(inputs[0].device).manual_seed(seed))


def repeated(function, settings, network, dtype, inputs, seed):
    """Return what `launched` does, from a network's second call of a kind in a row on by a graph.

    A kind is all but the weights, the values of the inputs and the seed. So a single call pays for
    no capture, and what is captured has run: every kernel is loaded. A network has one graph at
    most, which is freed with it. A capture that fails is said once, and `launched` takes over.
    """
    kind = (
        function,
        settings,
        dtype,
        *[None if t is None else (t.shape, t.dtype, t.device) for t in inputs],
    )
    if _LAST.get(network, (None,))[0] != kind:
        _LAST.pop(network, None)  # frees the memory of the graph before it
        outputs = launched(function, settings, network, dtype, inputs, seed)
        _LAST[network] = kind, None
        return outputs
    graph = _LAST[network][1]
    if graph is None:
        try:
            graph = Graph(function, settings, network, dtype, inputs)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            say_once(
                f"No CUDA graph could be captured ({why}): sampling goes on without, more slowly."
            )
            graph = False
        _LAST[network] = kind, graph
    return (
        graph(network, inputs, seed)
        if graph
        else launched(function, settings, network, dtype, inputs, seed)
    )
