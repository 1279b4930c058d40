"""A function of many small kernels as one CUDA graph, which the host launches once.

A function is called as function(settings, network, *inputs, rng) and returns tensors. `settings` is
hashable, `inputs` are tensors on one device or None, and all random numbers come from `rng`.
"""

import copy
import weakref

import torch

from gear.device import capturing
from gear.files import say_once

# network -> (kind of its last call, its Graph). The Graph is None before it is captured, and False
# if a capture failed.
_LAST = weakref.WeakKeyDictionary()


class Graph:
    """A captured call of `function` with copies of `network`, in `dtype`, and of `inputs`.

    A replay runs the captured kernels on the memory of these copies. Parameters and inputs are
    copied into it before the replay, and the outputs are copied out of it afterwards. Raises
    RuntimeError where the function cannot be captured.
    """

    def __init__(self, function, settings, network, dtype, inputs):
        self.network = copy.deepcopy(network).to(dtype)
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        device = inputs[0].device
        self.rng = torch.Generator(device)
        self.graph = torch.cuda.CUDAGraph()
        # without this every replay would draw the same random numbers
        self.graph.register_generator_state(self.rng)
        with capturing(self.graph, device):
            self.outputs = function(settings, self.network, *self.inputs, self.rng)

    def __call__(self, network, inputs, seed):
        torch._foreach_copy_(list(self.network.parameters()), list(network.parameters()))
        for captured, current in zip(self.inputs, inputs):
            if captured is not None:
                captured.copy_(current)
        self.rng.manual_seed(seed)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]


def launched(function, settings, network, dtype, inputs, seed):
    """Return the outputs of `function` with a network in `dtype`; its kernels are launched one by
    one.
    """
    if dtype != next(network.parameters()).dtype:
        network = copy.deepcopy(network).to(dtype)
    return function(settings, network, *inputs, torch.Generator(inputs[0].device).manual_seed(seed))


def repeated(function, settings, network, dtype, inputs, seed):
    """Return the outputs of `launched`, with a graph from the second consecutive call of a kind on.

    Two calls of a network are of one kind if they differ at most in the weights, the values of the
    inputs and the seed. The first call of a kind runs without a graph: a single call then pays for
    no capture, and all kernels are loaded when a capture begins. A network has at most one graph,
    which is freed together with the network. After a failed capture, which is reported once,
    `launched` does the work.
    """
    kind = (
        function,
        settings,
        dtype,
        *[None if t is None else (t.shape, t.dtype, t.device) for t in inputs],
    )
    if _LAST.get(network, (None,))[0] != kind:
        _LAST.pop(network, None)  # frees the memory of the previous graph before the call
        outputs = launched(function, settings, network, dtype, inputs, seed)
        _LAST[network] = kind, None
        return outputs
    graph = _LAST[network][1]
    if graph is None:
        try:
            graph = Graph(function, settings, network, dtype, inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            say_once(
                f"No CUDA graph could be captured ({reason}): sampling goes on without one, more "
                "slowly."
            )
            graph = False
        _LAST[network] = kind, graph
    return (
        graph(network, inputs, seed)
        if graph
        else launched(function, settings, network, dtype, inputs, seed)
    )
