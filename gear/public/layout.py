"""What a public layout is: names, sizes told by shapes, and every fault in one message."""

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
    marker: str  # pattern with which a name begins that no other layout has
    read: Callable  # {public name: shape} -> size: what `build` takes
    sizes: tuple  # the released ones, for a file whose own shapes contradict each other
    build: Callable  # size -> our module
    public: Callable  # (module) -> {our name: public name}
    # pattern of public names that may be absent, or have no place in our module
    optional: str = "$^"

    # layouts live as long as the program, and a size is asked for again and again
    @functools.cache  # noqa: B019
    def names(self, size):
        """Return ({our name: public name}, {public name: shape}) of a network of that size."""
        with torch.device("meta"):
            module = self.build(size)
        names = self.public(module)
        return names, {names[n]: tuple(t.shape) for n, t in module.state_dict().items()}

    def fit(self, shapes, source):
        """Return (size, {our name: public name}) for {public name: shape}; raises UserError listing
        what does not fit.
        """
        needed = {n: s for n, s in shapes.items() if not re.search(self.optional, n)}
        beyond = [
            n
            for n in needed
            for number in re.findall(r"\.(\d+)\.", n)
            if len(number) > 9 or int(number) > len(needed)
        ]
        if beyond:  # to build as many layers as such a number says would take forever
            raise UserError(
                listed(
                    f"{source} has the layout {self.name}, but counts beyond what it holds", beyond
                )
            )
        sizes, untold, walls = list(self.sizes), None, []
        try:
            sizes.insert(0, self.read(needed))
        except LookupError as error:  # a tensor that alone tells a size
            untold = f"missing {error.args[0]}"
        except UserError as error:  # sizes that contradict each other
            untold = str(error)
        for size in sizes:  # the size the shapes speak of, then the released ones
            try:
                names, expected = self.names(size)
            except (
                ArithmeticError,
                RuntimeError,
                UserError,
            ) as error:  # no network is of that size
                untold = str(error).splitlines()[0]
                continue
            expected = {n: s for n, s in expected.items() if not re.search(self.optional, n)}
            faults = mismatches(expected, needed)
            if not faults:
                return size, names
            walls.append(faults)
        best = min(walls, key=len, default=[])
        if untold and (not best or len(best) > 12):
            best = [untold]
        raise UserError(listed(f"{source} has the layout {self.name}, but does not fit it", best))


def told(shapes, *places):
    """Return the size that most of `places`, pairs (name, axis), agree on; raises LookupError
    naming the first if all lack.

    One tensor missing or of another shape is then found out by the others, and named.
    """
    values = [
        shapes[name][axis] for name, axis in places if name in shapes and len(shapes[name]) > axis
    ]
    if not values:
        raise LookupError(places[0][0])
    return Counter(values).most_common(1)[0][0]
