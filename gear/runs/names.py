"""The names of runs: how they are built, parsed and checked."""

import re
from dataclasses import dataclass, replace

from gear.config import UserError

NAME_BYTES = 255  # the longest name of a folder that file systems accept
REFERENCE = "reference"  # the folder, beside those of the runs, of records (gear.runs.reference)
SEEDS = "-s[012]"  # the end of notebooks' patterns of runs: seeds 0, 1 and 2
SEED = r"-s(0|-?[1-9][0-9]*)"
ENDING = re.compile(rf"(?s)(?:{SEED})?(?:-(.+))?")  # what may follow the recipe in a name
FOREIGN = re.compile(rf"(?s)(.+?|)(?:{SEED}(?:-(.+))?)?")  # a name that begins with no recipe


@dataclass(frozen=True)
class RunName:
    """The name of a run: PRESET-METHOD-sSEED-CELL, without the parts that are empty.

    Preset and method form the run's recipe. The cell says how the run differs from the recipe: it
    is one setting of a study, or a label that the user chose.
    """

    preset: str
    method: str = ""
    cell: str = ""
    seed: int | None = None

    def __str__(self):
        seed = "" if self.seed is None else f"s{self.seed}"
        return "-".join(filter(None, (self.preset, self.method, seed, self.cell)))

    @property
    def recipe(self):
        """The name of the run's recipe."""
        return str(RunName(self.preset, self.method))

    @classmethod
    def parse(cls, text, recipes):
        """Parse the name of a run; `str` of the result is the same text.

        recipes: {name: RunName}. If the text begins with the name of a recipe, the longest one
        gives preset and method. Otherwise the part before the seed is the preset.
        """
        words = text.split("-")
        for count in range(len(words), 0, -1):
            start = "-".join(words[:count])
            if start in recipes and (ending := ENDING.fullmatch(text[len(start) :])):
                seed, cell = ending.groups()
                return replace(recipes[start], cell=cell or "", seed=seed and int(seed))
        preset, seed, cell = FOREIGN.fullmatch(text).groups()
        return cls(preset, "", cell or "", seed and int(seed))


def listed(pattern):
    """Return the names that a list of digits stands for: "NAME-s[01]" gives "NAME-s0", "NAME-s1".

    Any other pattern gives an empty list.
    """
    parts = re.fullmatch(r"([^*?[]*)\[(\d+)\]([^*?[]*)", pattern)
    return [f"{parts[1]}{digit}{parts[3]}" for digit in parts[2]] if parts else []


def reseeded(pattern, seeds):
    """Return a `pattern` of runs that ends in SEEDS with other `seeds`.

    Raises UserError for several seeds of which one has two digits.
    """
    if len(seeds) > 1 and max(seeds) > 9:
        raise UserError(
            f"seeds {seeds}: a pattern of runs has one digit for each seed. Use seeds from 0 to 9, "
            "or a single seed."
        )
    digits = "".join(map(str, seeds))
    return pattern.replace(SEEDS, f"-s[{digits}]" if len(seeds) > 1 else f"-s{digits}")
