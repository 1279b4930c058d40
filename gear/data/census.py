"""What a source leaves out: counted, named, and an error where images are lost."""

from collections import Counter

from gear.config import UserError
from gear.data.pixels import suffix_of, why_no_image
from gear.files import say_once

LOST_SHARE = 0.01  # of a source's images that may be left out


class Census:
    """What a source leaves out, by reason; `lost` are images that cannot be had."""

    def __init__(self):
        self.reasons, self.lost = {}, Counter()

    def leave_out(self, name, reason, is_loss=False):
        self.reasons.setdefault(reason, []).append(name)
        if is_loss:
            self.lost[reason] += 1

    def takes(self, name, open_file):
        """Say whether a file is an image, and count it where it is none."""
        if why := why_no_image(name, open_file):
            self.leave_out(name, *why)
        return not why

    def __str__(self):
        """Say it in a line: how many, why, and one of them by name; "" where nothing was left
        out.
        """
        return "; ".join(f"{len(n)} ({why}), as {n[0]}" for why, n in self.reasons.items())

    def check(self, source, names, top=""):
        """Say once what was left out; raises UserError where a class, or more than LOST_SHARE of
        images, is lost.

        `top` is what the names of the images lack in front; None: what was left out is not called
        as they are.
        """
        num_images, lost = len(names), self.lost.total()
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
        if lost > LOST_SHARE * (num_images + lost):
            named = "; ".join(
                f"{count} ({why}): {', '.join(self.reasons[why][:3])}"
                for why, count in self.lost.items()
            )
            raise UserError(
                f"{lost} of {num_images + lost} images in '{source}' cannot be taken, over "
                f"{LOST_SHARE:.0%}: {named}. Save them as PNG or JPEG, or remove them."
            )
        if self.reasons:
            say_once(f"{source}: {num_images} images; left out: {self}")
