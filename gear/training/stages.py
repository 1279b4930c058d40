"""The stages of training: what each trains, what it keeps frozen, and the updates that make up one
of its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gear.training.objectives import (
    discriminator_update,
    generator_update,
    teacher_update,
    tokenizer_update,
)

# networks of which an exponential moving average is kept, where they train
AVERAGED = ("tokenizer", "generator")


@dataclass(frozen=True)
class Stage:
    """One kind of training. Every network steps when the last update is done.

    Guidance so reads the generator before its step, and next-token targets come from the tokenizer
    before its step, as in the public code.
    """

    trains: tuple[str, ...]  # networks; the projector trains only where features are aligned
    updates: tuple[Callable, ...]  # of gear/training/objectives.py, in their order
    frozen: tuple[str, ...] = ()  # networks of the run `tokenizer_run`, which are only read


STAGES = {
    "tokenizer": Stage(
        ("tokenizer", "discriminator"), (tokenizer_update, discriminator_update)
    ),  # warm-up and control
    "joint": Stage(  # GEAR
        ("tokenizer", "discriminator", "generator", "projector"),
        (tokenizer_update, discriminator_update, generator_update),
    ),
    "generator": Stage(  # LlamaGen, LlamaGen-REPA, a fresh generator on a GEAR tokenizer
        ("generator", "projector"), (generator_update,), frozen=("tokenizer",)
    ),
    "teacher": Stage(("teacher",), (teacher_update,)),
}


def gradients(state, samples):
    """Add up the gradients of one step, Algorithm 1 up to the steps of the optimizers; `samples` is
    what a stream gives.
    """
    for batch in state.batches(*samples):  # one tokenizer forward, one teacher forward, shared by
        # joint = tokenizer, discriminator, generator:
        for update in STAGES[state.config.stage].updates:
            with state.autocast():
                update(state, batch)  # loss and gradient of one network
