"""Names of runs: built, read and checked here alone."""

import re
from dataclasses import dataclass, replace

from gear.config import UserError

NAME_BYTES = 255  # of a folder's name, at most
REFERENCE = "reference"  # the folder among the runs that holds records (gear.runs.reference)
SEEDS = "-s[012]"  # ends the patterns of runs in notebooks: the seeds 0, 1 and 2
SEED = r"-s(0|-?[1-9][0-9]*)"
ENDING = re.compile(rf"(?s)(?:{SEED})?(?:-(.+))?")  # of a name that begins with a recipe
FOREIGN = re.compile(rf"(?s)(.+?|)(?:{SEED}(?:-(.+))?)?")


@dataclass(frozen=True)
class RunName:
    """What a run is called: PRESET-METHOD-sSEED-CELL, without the parts that are empty.

    Preset and method are the run's recipe. A cell is one setting of a study, or another label: what
    differs from the recipe.
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
        """Read a run's name, which may begin with a recipe; `str` gives the text back.

        recipes: {name: RunName}, of which the longest that fits counts. In any other name, what
        stands before the seed is the preset.
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
    """Return the names that a list of digits, "NAME-s[012]", asks for; none for another pattern."""
    parts = re.fullmatch(r"([^*?[]*)\[(\d+)\]([^*?[]*)", pattern)
    return [f"{parts[1]}{digit}{parts[3]}" for digit in parts[2]] if parts else []


def reseeded(pattern, seeds):
    """Return a pattern of runs that ends in SEEDS, for other `seeds`.

    Raises UserError where there are several of them and one has two digits.
    """
    if len(seeds) > 1 and max(seeds) > 9:
        raise UserError(
            f"seeds {seeds}: a pattern of runs has one digit for each seed, or names a single one."
        )
    digits = "".join(map(str, seeds))
    return pattern.replace(SEEDS, f"-s[{digits}]" if len(seeds) > 1 else f"-s{digits}")
