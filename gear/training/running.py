"""The execution mode of a training step: "plain" (as written in objectives.py), "compiled", or
"graphed" (one CUDA graph).

On a GPU, a large step is compiled, which fuses the operations between matrix products. A small step
takes longer to launch than to compute: it is captured once and replayed as one CUDA graph, unless
it is split into micro-batches or over several processes. All modes compute the same up to rounding,
except for dropout, which compiled code draws differently from the step's seed. If compiling or
capturing fails, a message says so and the step runs in plain mode.
"""

import sys

import torch

from gear.config import UserError
from gear.device import capturing
from gear.training.stages import gradients
from gear.training.state import step_seed


def way_of(config, device, runtime, is_alone):
    """Return the execution mode of a run's steps on `device`: "plain", "compiled" or "graphed".

    `is_alone` says that a single process computes each step from its full batch at once. Otherwise
    no graph is captured: micro-batches reseed the random generator, and processes communicate,
    neither of which a CUDA graph can contain.
    """
    if runtime.compile or runtime.eager:
        return "compiled" if runtime.compile else "plain"
    if device.type != "cuda" or runtime.fsdp:
        return "plain"
    return "graphed" if config.is_small and is_alone else "compiled"


class Ahead:
    """The next item of an iterator, fetched before it is needed.

    An error while fetching is raised when the item is taken.
    """

    def __init__(self, items):
        self.items = items
        self.item = None
        self.error = None
        self.fetch()

    def fetch(self):
        """Fetch the next item, or None after the last one."""
        try:
            self.item = next(self.items, None)
        except Exception as error:
            self.error = error

    def take(self):
        """Return the fetched item, or raise the error that fetching it raised."""
        if self.error is not None:
            raise self.error
        return self.item


class Running:
    """Computes the gradients of a State's steps in one of the modes of `way_of`, and in plain mode
    if that fails.
    """

    def __init__(self, state, mode):
        self.state = state
        self.mode = mode
        self.graphs = {}  # {whether the adversarial term is on: Graph}
        self.compiled = compile_networks(state) if mode == "compiled" else []

    def __call__(self, samples):
        """Compute the gradients of one step: see `gradients`."""
        try:
            if self.mode == "graphed":
                self._graph(samples).replay(samples)
            else:
                gradients(self.state, samples)
        except (UserError, torch.OutOfMemoryError):
            raise
        # the compiler, the capture and the driver raise errors of many types
        except Exception as error:
            if self.mode == "plain":
                raise
            self._fall_back(error)
            gradients(self.state, samples)

    def _graph(self, samples):
        """Return the graph of this step, captured if there is none yet.

        A second graph is captured once the adversarial term sets in.
        """
        has_gan = self.state.config.trains("discriminator") and self.state.gan_is_on
        if has_gan not in self.graphs:
            self.graphs.clear()  # frees the memory of the previous graph
            self.graphs[has_gan] = Graph(self.state, samples)
        return self.graphs[has_gan]

    def _fall_back(self, error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"steps cannot be {self.mode} here and run in plain mode instead: {reason[:200]}",
            file=sys.stderr,
        )
        self.mode = "plain"
        self.graphs.clear()
        for part in self.compiled:
            part._compiled_call_impl = None  # torch has no public function that undoes compile()
        self.state.is_compiled = False
        self.state.discard()
        torch.manual_seed(step_seed(self.state.config.seed, self.state.step))


class Graph:
    """The gradients of a step as a CUDA graph, for samples of fixed shapes: one launch for the
    entire step.
    """

    def __init__(self, state, samples):
        self.state, self.samples = state, [sample.clone() for sample in samples]
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(state.device)
        stream.wait_stream(torch.cuda.current_stream(state.device))
        # a first pass outside the graph, in which libraries allocate their buffers
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
        torch.manual_seed(
            step_seed(state.config.seed, state.step)
        )  # both passes drew random numbers

    def replay(self, samples):
        """Compute the gradients of one step on `samples`, which are copied into the graph's own
        input memory.
        """
        for static, sample in zip(self.samples, samples, strict=True):
            static.copy_(sample)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.state.terms = {name: dict(terms) for name, terms in self.terms.items()}


def compile_networks(state):
    """Compile the modules that a State's steps run; returns these modules.

    A generator's blocks are compiled one by one, so that one compilation serves all of them. A
    frozen tokenizer is not compiled: compiled code rounds less often than the plain code that
    encodes at inference, and in bf16 some indices would differ.
    """
    networks = state.networks
    alone = ("discriminator", "teacher", "detector")
    parts = [networks[name] for name in alone if name in networks]
    parts += list(networks["generator"].blocks) if "generator" in networks else []
    if "tokenizer" in state.averages:  # it trains; micro-batches also call the encoder alone
        parts += [networks["tokenizer"], networks["tokenizer"].encoder]
    parts += [part for part in (state.teacher_features, state.lpips) if part is not None]
    for part in parts:
        # dynamic=False: sizes of an earlier run in this process must not make these sizes dynamic
        part.compile(dynamic=False)
    state.is_compiled = True
    return parts
