"""A public layout: the tensor names of a network, and the sizes that follow from tensor shapes.

A file that does not fit its layout raises one message that lists every fault.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gear.config import UserError
from gear.weights import listed, mismatches


@dataclass(frozen=True)
class Layout:
    """One public layout of one network."""

    name: str
    kind: str  # "tokenizer", "generator", "projector" or "discriminator"
    marker: str  # pattern of the beginning of a public name that no other layout has
    read: Callable  # {public name: shape} -> size, the argument of `build`
    sizes: tuple  # the released sizes, for a file whose shapes contradict each other
    build: Callable  # size -> our module
    public: Callable  # our module -> {our name: public name}
    # pattern of public names that may be missing, or that our module does not have
    optional: str = "$^"

    # a cache on a method keeps its layout alive, and all layouts live as long as the program
    @functools.cache  # noqa: B019
    def names(self, size):
        """Return ({our name: public name}, {public name: shape}) of a network of a size."""
        with torch.device("meta"):
            module = self.build(size)
        names = self.public(module)
        return names, {names[n]: tuple(t.shape) for n, t in module.state_dict().items()}

    def fit(self, shapes, source):
        """Return (size, {our name: public name}) of the network with the tensors {public name:
        shape}.

        Raises UserError listing the tensors that do not fit, compared with the size that fits best.
        `source` begins the message.
        """
        needed = {n: s for n, s in shapes.items() if not re.search(self.optional, n)}
        beyond = [
            n
            for n in needed
            for number in re.findall(r"\.(\d+)\.", n)
            if len(number) > 9 or int(number) > len(needed)
        ]
        if beyond:  # building as many layers as such a number says would take forever
            raise UserError(
                listed(
                    f"{source} has the layout {self.name}, but numbers more layers than it has "
                    "tensors",
                    beyond,
                )
            )
        sizes = list(self.sizes)
        size_fault = None  # why the shapes give no size
        fault_lists = []
        try:
            sizes.insert(0, self.read(needed))
        except LookupError as error:  # the file lacks every tensor that has this size
            size_fault = f"missing {error.args[0]}"
        except UserError as error:  # the shapes contradict each other
            size_fault = str(error)
        for size in sizes:  # the size read from the shapes, then the released ones
            try:
                names, expected = self.names(size)
            except (ArithmeticError, RuntimeError, UserError) as error:  # an impossible size
                size_fault = str(error).splitlines()[0]
                continue
            expected = {n: s for n, s in expected.items() if not re.search(self.optional, n)}
            faults = mismatches(expected, needed)
            if not faults:
                return size, names
            fault_lists.append(faults)
        faults = min(fault_lists, key=len, default=[])
        if size_fault and (not faults or len(faults) > 12):
            faults = [size_fault]
        raise UserError(listed(f"{source} has the layout {self.name}, but does not fit it", faults))


def agreed_size(shapes, *axes):
    """Return the size that most of `axes`, pairs (tensor name, axis), have in {name: shape}.

    By this vote a single tensor that is missing or of another shape does not change the size, so
    that the comparison with the layout can name it. Raises LookupError, with the first name, if no
    tensor has its axis.
    """
    values = [
        shapes[name][axis] for name, axis in axes if name in shapes and len(shapes[name]) > axis
    ]
    if not values:
        raise LookupError(axes[0][0])
    return Counter(values).most_common(1)[0][0]
