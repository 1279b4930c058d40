"""The values that notebook parameters may have: a name means the same in all notebooks."""

from gear.config import Count, NonNegative, Pixels, Samples, Tau, check_value, read_numbers
from gear.device import find_device
from gear.experiments.studies import seeds_of
from gear.generator.sampling import Guidance

RANGES = {
    "cfg_scale": Guidance,
    "count": Samples,
    "image_size": Pixels,
    "images": Count,
    "k": Count,
    "smooth": NonNegative,
    "tau": Tau,
    "window": Count,
}
READ = {  # what raises UserError for a text that says no numbers, or no device
    "at": lambda text: read_numbers("at", text, Count),
    "device": find_device,
    "scales": lambda text: read_numbers("scales", text, Guidance),
    "seeds": seeds_of,
}


def check_parameter(key, value):
    """Raise UserError unless the value of a notebook's parameter is in the range of its name."""
    if isinstance(value, str) and key in READ:
        READ[key](value)
    elif not isinstance(value, str) and key in RANGES:
        check_value(key, value, RANGES[key])
