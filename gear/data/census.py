"""The files that a source leaves out: they are counted and named, and losing images is an error."""

from collections import Counter

from gear.config import UserError
from gear.data.pixels import suffix_of, why_no_image
from gear.files import say_once

LOST_SHARE = 0.01  # share of a source's images that may be lost


class Census:
    """The files that a source leaves out.

    reasons: {reason: names}. lost: {reason: number of files that are images but cannot be read}.
    """

    def __init__(self):
        self.reasons = {}
        self.lost = Counter()

    def leave_out(self, name, reason, is_loss=False):
        """Count a file that is left out; `is_loss` says that it is an image."""
        self.reasons.setdefault(reason, []).append(name)
        if is_loss:
            self.lost[reason] += 1

    def takes(self, name, open_file):
        """Return whether a file is an image that can be used; count it as left out if not."""
        if rejection := why_no_image(name, open_file):
            self.leave_out(name, *rejection)
        return not rejection

    def __str__(self):
        """List number, reason and one name per reason in one line; "" if nothing was left out."""
        return "; ".join(
            f"{len(names)} ({reason}), as {names[0]}" for reason, names in self.reasons.items()
        )

    def check(self, source, names, top=""):
        """Print once what was left out; raises UserError if a whole class, or more than LOST_SHARE
        of the images, is lost.

        names: those of the images that are used. top: the folder that their names omit and the
        names of left-out files have in front, or None if the two kinds of names differ otherwise;
        lost classes are then not looked for.
        """
        num_images = len(names)
        num_lost = self.lost.total()
        classes = {name.split("/")[0] for name in names if "/" in name}
        for reason in self.lost if top is not None else ():
            for name in (name.removeprefix(top) for name in self.reasons[reason]):
                if (
                    classes
                    and ("/" in name or not suffix_of(name))
                    and name.split("/")[0] not in classes
                ):
                    raise UserError(
                        f"the class '{name.split('/')[0]}' of '{source}' is lost: {top}{name} is "
                        f"{reason}."
                    )
        if num_lost > LOST_SHARE * (num_images + num_lost):
            listed = "; ".join(
                f"{count} ({reason}): {', '.join(self.reasons[reason][:3])}"
                for reason, count in self.lost.items()
            )
            raise UserError(
                f"{num_lost} of {num_images + num_lost} images in '{source}' cannot be taken, over "
                f"{LOST_SHARE:.0%}: {listed}. Save them as PNG or JPEG, or remove them."
            )
        if self.reasons:
            say_once(f"{source}: {num_images} images; left out: {self}")
