"""How the gradients of a step are computed: as they stand in objectives.py, compiled, or as one
CUDA graph.

On a GPU a large step is compiled, which fuses what lies between products. A small one takes longer
to launch than to compute: it is captured once and replayed as one graph, unless it goes in parts or
over several processes. Both compute the same up to rounding, but for dropout, which compiled code
draws in its own way from the step's seed. Where either fails, the step is computed plainly, and a
line says so.
"""

import sys

import torch

from gear.config import UserError
from gear.device import capturing
from gear.training.stages import gradients
from gear.training.state import step_seed


def way_of(config, device, runtime, is_alone):
    """Return how the steps of a run are computed on `device`: "plain", "compiled" or "graphed".

    `is_alone`: whether one process computes a step from its whole batch at once. Parts reseed and
    processes talk to each other, which no graph holds.
    """
    if runtime.compile or runtime.eager:
        return "compiled" if runtime.compile else "plain"
    if device.type != "cuda" or runtime.fsdp:
        return "plain"
    return "graphed" if config.is_small and is_alone else "compiled"


class Ahead:
    """The next item of an iterator, fetched early; what that raises is raised when the item is
    asked for.
    """

    def __init__(self, items):
        self.items, self.item, self.error = items, None, None
        self.fetch()

    def fetch(self):
        """Fetch the next item, None after the last."""
        try:
            self.item = next(self.items, None)
        except Exception as error:
            self.error = error

    def take(self):
        """Return the item that was fetched."""
        if self.error is not None:
            raise self.error
        return self.item


class Running:
    """Computes the gradients of a State's steps one of the ways of `way_of`, and plainly where that
    fails.
    """

    def __init__(self, state, way):
        self.state, self.way, self.graphs = state, way, {}
        self.compiled = compile_networks(state) if way == "compiled" else []

    def __call__(self, samples):
        """Add up the gradients of one step: see `gradients`."""
        try:
            if self.way == "graphed":
                self._graph(samples).replay(samples)
            else:
                gradients(self.state, samples)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of many types: the compiler's, the graph's, the driver's
            if self.way == "plain":
                raise
            self._fall_back(error)
            gradients(self.state, samples)

    def _graph(self, samples):
        """Return the graph of this step, captured if it is the first of its kind: the adversarial
        term comes late.
        """
        kind = self.state.config.trains("discriminator") and self.state.gan_is_on
        if kind not in self.graphs:
            self.graphs.clear()  # the memory of the one before it
            self.graphs[kind] = Graph(self.state, samples)
        return self.graphs[kind]

    def _fall_back(self, error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"steps cannot be {self.way} here, and are computed plainly: {reason[:200]}",
            file=sys.stderr,
        )
        self.way = "plain"
        self.graphs.clear()
        for part in self.compiled:
            part._compiled_call_impl = None  # torch has no public way back
        self.state.is_compiled = False
        self.state.discard()
        torch.manual_seed(step_seed(self.state.config.seed, self.state.step))


class Graph:
    """The gradients of a step on one kind of samples, as a CUDA graph: one launch, whatever the
    step consists of.
    """

    def __init__(self, state, samples):
        self.state, self.samples = state, [sample.clone() for sample in samples]
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(state.device)
        stream.wait_stream(torch.cuda.current_stream(state.device))
        # libraries set up what they need the first time they are used
        with torch.cuda.stream(stream):
            gradients(state, self.samples)
            state.discard()
        torch.cuda.current_stream(state.device).wait_stream(stream)
        with capturing(self.graph, state.device):
            gradients(state, self.samples)
        parameters = [p for optimizer in state.optimizers.values() for p in optimizer.parameters]
        self.gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self.terms = state.terms
        state.discard()
        torch.manual_seed(step_seed(state.config.seed, state.step))  # both passes have drawn

    def replay(self, samples):
        """Compute the gradients of one step on `samples`, into the memory in which they were
        captured.
        """
        for static, sample in zip(self.samples, samples, strict=True):
            static.copy_(sample)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.state.terms = {name: dict(terms) for name, terms in self.terms.items()}


def compile_networks(state):
    """Compile what a State's step runs; returns the parts. A generator's blocks go one by one: one
    compilation serves all.

    A frozen tokenizer is left alone: compiled code rounds less than the one that encodes at
    inference, and where a run is in bf16 some indices would be others.
    """
    networks = state.networks
    parts = [networks[name] for name in ("discriminator", "teacher") if name in networks]
    parts += list(networks["generator"].blocks) if "generator" in networks else []
    if "tokenizer" in state.averages:  # it trains; the encoder alone is for a batch in parts
        parts += [networks["tokenizer"], networks["tokenizer"].encoder]
    parts += [part for part in (state.teacher_features, state.lpips) if part is not None]
    for part in parts:
        # another run's sizes in this process must not make those of this one variable
        part.compile(dynamic=False)
    state.is_compiled = True
    return parts
