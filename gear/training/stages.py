"""The stages of training: the networks that each stage trains, the networks that it keeps frozen,
and the updates that make up one of its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gear.training.objectives import (
    detector_update,
    discriminator_update,
    generator_update,
    teacher_update,
    tokenizer_update,
)

# networks of which an exponential moving average is kept in the stages that train them
AVERAGED = ("tokenizer", "generator")


@dataclass(frozen=True)
class Stage:
    """One kind of training. All optimizers step together, after the last update of a step.

    Guidance therefore runs through the generator as it was before the step, and next-token targets
    come from the tokenizer as it was before the step. The public code does the same.
    """

    trains: tuple[str, ...]  # networks; the projector trains only where features are aligned
    updates: tuple[Callable, ...]  # functions of gear/training/objectives.py, in their order
    frozen: tuple[str, ...] = ()  # networks that are read from `tokenizer_run` and never change


STAGES = {
    "tokenizer": Stage(
        ("tokenizer", "discriminator"), (tokenizer_update, discriminator_update)
    ),  # warm-up, and the control: the warm-up tokenizer trained for longer without guidance
    "joint": Stage(  # GEAR
        ("tokenizer", "discriminator", "generator", "projector"),
        (tokenizer_update, discriminator_update, generator_update),
    ),
    "generator": Stage(  # LlamaGen, the baseline, and a new generator on a GEAR tokenizer
        ("generator", "projector"), (generator_update,), frozen=("tokenizer",)
    ),
    "teacher": Stage(("teacher",), (teacher_update,)),
    "detector": Stage(("detector",), (detector_update,)),
}


def gradients(state, samples):
    """Compute all gradients of one step: Algorithm 1 up to the steps of the optimizers.

    `samples` are the tensors that a stream yields for the step.
    """
    # one Batch per micro-batch; its updates share one tokenizer forward and one teacher forward
    for batch in state.batches(*samples):
        # in the stage "joint": tokenizer, discriminator, generator
        for update in STAGES[state.config.stage].updates:
            with state.autocast():
                update(state, batch)  # the loss and the gradient of one network
