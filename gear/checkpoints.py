"""Weights in and out. Loading is strict: an error lists what is missing, unexpected or of another shape."""

from gear.config import UserError, from_dict
from gear.generator.model import Generator, GeneratorConfig
from gear.run import Run
from gear.tokenizer.autoencoder import TokenizerConfig
from gear.tokenizer.model import Tokenizer


def token_grid(config):
    """Return the token grid (h, w) of a run's configuration, a dict."""
    tokenizer = from_dict(TokenizerConfig, config["tokenizer"])
    return (config["data"]["image_size"] // tokenizer.downsampling,) * 2


def load_networks(run, file="networks", step=None):
    """Return a checkpoint's tensors grouped by their first name: {"tokenizer": {...}, "tokenizer_ema": {...}, ...}."""
    groups = {}
    for name, tensor in run.load_checkpoint(file, step).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def network(groups, name, source):
    """Return the tensors of the network `name` of a run's `load_networks`; raises UserError when it is not there."""
    if name not in groups:
        raise UserError(f"run '{source}' holds no {name}: it holds {', '.join(sorted(groups)) or 'nothing'}.")
    return groups[name]


def check_fit(expected, tensors, source, what):
    """Raise UserError listing what is missing, unexpected or of another shape; `expected` is {name: shape}."""
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    faults = [f"missing {n} {expected[n]}" for n in expected if n not in found]
    faults += [f"unexpected {n} {found[n]}" for n in found if n not in expected]
    faults += [f"{n} has shape {found[n]}, expected {s}" for n, s in expected.items() if n in found and found[n] != s]
    if faults:
        listed = "\n  ".join(faults[:12]) + (f"\n  and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise UserError(f"the weights of '{source}' do not fit this {what}:\n  {listed}")


def load_module(module, tensors, source):
    """Load `tensors` into `module`, strictly; raises UserError listing the names that do not fit. Returns the module."""
    check_fit({n: tuple(t.shape) for n, t in module.state_dict().items()}, tensors, source, type(module).__name__)
    module.load_state_dict(tensors)
    return module


def load_tokenizer(name):
    """Load the tokenizer of the run `name`, averaged weights, in evaluation mode and frozen."""
    run = Run.open(name)
    tokenizer = Tokenizer(from_dict(TokenizerConfig, run.config["tokenizer"]))
    weights = load_networks(run)
    return load_module(tokenizer, _averaged(weights, "tokenizer", name), name).eval().requires_grad_(False)


def load_generator(name):
    """Load the generator of the run `name`, averaged weights, in evaluation mode and frozen."""
    run = Run.open(name)
    config = from_dict(GeneratorConfig, run.config["generator"])
    generator = Generator(config, run.config["tokenizer"]["codebook_size"])
    return load_module(generator, _averaged(load_networks(run), "generator", name), name).eval().requires_grad_(False)


def _averaged(weights, name, source):
    """Pick a network's average, or the network where it was not trained and has none."""
    return weights.get(f"{name}_ema") or network(weights, name, source)
