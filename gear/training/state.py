"""The state of a run between two steps (networks, their averages, optimizers, the step number), and
the Batch that the updates of a step share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gear.checkpoints import is_file, tokenizer_start
from gear.config import UserError
from gear.data.stream import load
from gear.device import derived_seed
from gear.evaluation.detector import Detector
from gear.evaluation.lpips import load_lpips
from gear.generator.model import Generator, Projector, Projectors
from gear.images import check_divides
from gear.runs.run import Run
from gear.teachers import check_grid, load_teachers, side_by_side
from gear.teachers.scenes import ScenesTeacher
from gear.tokenizer.discriminator import Discriminator
from gear.tokenizer.model import Tokenized, Tokenizer, initialise_from_data
from gear.training.fsdp import shard_blocks, shard_like
from gear.training.optim import EMA, Optimizer, learning_rate_factor
from gear.training.processes import Processes
from gear.training.stages import AVERAGED
from gear.weights import load_module, load_networks, network

NETWORKS = ("tokenizer", "discriminator", "generator", "projector", "teacher", "detector")
INITIAL_IMAGES = 2_000  # training images from which a tokenizer is initialised


def step_seed(seed, step):
    """Return the seed for the random draws of a step, a function of (seed, step).

    Step -1 stands for the initialisation.
    """
    return derived_seed(seed, step + 1)


@dataclass
class Batch:
    """The data that all updates of a step share, computed once: images, labels, teacher features
    and the tokenizer's outputs.
    """

    images: torch.Tensor  # (B, 3, H, W); without pixels, (B, 0), if codes are looked up
    labels: torch.Tensor  # (B,)
    target: torch.Tensor | None = None  # f(x) of Eq. 5, standardised, no gradient: (B, L, C)
    tokenized: Tokenized | None = None  # with gradients; None unless the tokenizer trains
    indices: torch.Tensor | None = None  # (B, L)
    # (B,) bool: the images whose class condition is replaced by the null class in this step
    dropped: torch.Tensor | None = None
    # maps this micro-batch's mean code usage (K,) to the full batch's
    global_mean: Callable | None = None


class State:
    """Networks, averages, optimizers and the step number of a run, on a device.

    A network that the run's stage neither trains nor reads is None. `lpips`, `teacher_features` and
    `widths` are None if the run does not use them. `parts` is the number of micro-batches per step.
    """

    def __init__(self, config, device, parts=1, processes=None, checkpointing=False):
        self.config = config
        self.device = device
        self.step = 0
        self.parts = parts
        self.is_compiled = False
        self.processes = processes or Processes(device, config.batch_size, parts)
        self.skipped = 0  # consecutive skipped steps
        self.terms = {}  # {optimizer: {loss term: its sum over this step's micro-batches so far}}
        self.tokenizer = self.discriminator = self.generator = self.projector = None
        self.teacher = self.detector = None
        self.averages = {}
        self.optimizers = {}
        self.teacher_features = None  # the teachers, their features concatenated
        self.widths = None  # channels of each teacher's features
        self.lpips = None
        if config.uses("tokenizer"):
            check_divides((config.data.image_size,) * 2, config.tokenizer.downsampling)
        if config.trains("tokenizer"):
            self._add_tokenizer(checkpointing)
        elif config.uses("tokenizer"):
            self._add_frozen_tokenizer()
        if config.trains("generator"):
            self._add_generator(checkpointing)
        if config.trains("teacher"):
            self.teacher = self._add("teacher", ScenesTeacher())
            self._optimize("teacher", [self.teacher], config.optimizer.generator_lr)
        if config.trains("detector"):
            self.detector = self._add("detector", Detector())
            self._optimize("detector", [self.detector], config.optimizer.generator_lr)

    def _add_tokenizer(self, checkpointing):
        config = self.config
        self.tokenizer = self._add(
            "tokenizer", Tokenizer(config.tokenizer, config.precision, checkpointing)
        )
        objective = config.objective
        discriminator = Discriminator(
            objective.disc_channels, objective.disc_layers, objective.disc_norm
        )
        if self.processes.world > 1 and self.device.type == "cuda":  # BatchNorm over the full batch
            discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator = self._add("discriminator", discriminator)
        self._optimize("tokenizer", [self.tokenizer], config.optimizer.tokenizer_lr)
        self._optimize("discriminator", [self.discriminator], config.optimizer.tokenizer_lr)
        if config.objective.lpips_weight > 0:
            self.lpips = load_lpips(self.device, config.precision)
        # start from the parent's last state: live weights, average and discriminator
        if config.tokenizer_run:
            parent_weights, _ = tokenizer_start(_finished_parent(config.tokenizer_run))
            averaged = self.averages["tokenizer"].module
            modules = self.networks | {"tokenizer_ema": averaged}
            for name, tensors in parent_weights.items():
                load_module(modules[name], tensors, config.tokenizer_run)

    def _add_frozen_tokenizer(self):
        config = self.config
        if not config.tokenizer_run:
            raise UserError(
                f"the stage '{config.stage}' needs a tokenizer: set tokenizer_run to a run's name "
                "or a file."
            )
        parent = _finished_parent(config.tokenizer_run)
        parent_weights, precision = tokenizer_start(parent, frozen=True)
        self.tokenizer = self._add("tokenizer", Tokenizer(config.tokenizer, precision))
        load_module(self.tokenizer, parent_weights["tokenizer_ema"], config.tokenizer_run)
        self.tokenizer.eval().requires_grad_(False)

    def _add_generator(self, checkpointing):
        config = self.config
        generator = Generator(config.generator, config.tokenizer.codebook_size, checkpointing)
        self.generator = self._add("generator", generator)
        trained = [self.generator]
        if config.is_aligned:
            stride = config.tokenizer.downsampling
            teachers = load_teachers(config.teacher, config.data, stride)
            for teacher in teachers:
                check_grid(teacher, config.data.image_size, stride)
            self.teacher_features = side_by_side(teachers).to(
                self.device, memory_format=self.layout
            )
            self.widths = [t.dim for t in teachers]
            projectors = [Projector(config.generator, width) for width in self.widths]
            projector = projectors[0] if len(teachers) == 1 else Projectors(projectors)
            self.projector = self._add("projector", projector)
            trained.append(self.projector)
        self._optimize("generator", trained, config.optimizer.generator_lr)

    @property
    def layout(self):
        """The memory format in which convolutions are fastest on this device."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def _add(self, name, module):
        """Move a network and, if this stage averages it, a new average of it to the device; returns
        the network.
        """
        copies = [module]
        if name in AVERAGED and self.config.trains(name):
            self.averages[name] = EMA(module, getattr(self.config.optimizer, f"{name}_ema"))
            copies.append(self.averages[name].module)
        for copied in copies:
            # sharded on the CPU first, because one device may not hold the full network
            if self.processes.shard and name == "generator":
                shard_blocks(copied.blocks, self.device, self.processes.world)
            copied.to(self.device, memory_format=self.layout)
        return module

    def _optimize(self, name, networks, lr):
        self.optimizers[name] = Optimizer(networks, lr, self.config.optimizer)

    @property
    def networks(self):
        """The networks of this run that are not None: {name: module}."""
        modules = {name: getattr(self, name) for name in NETWORKS}
        return {name: module for name, module in modules.items() if module is not None}

    def start(self, source):
        """Initialise a new run's tokenizer from training images of a Source, if `init_from_data` is
        set and the tokenizer has no parent.
        """
        config = self.config
        if (
            config.trains("tokenizer")
            and config.tokenizer.init_from_data
            and not config.tokenizer_run
        ):
            images, _ = load(source, "train", INITIAL_IMAGES)
            initialise_from_data(self.tokenizer, images, config.seed)
            self.averages["tokenizer"].module.load_state_dict(self.tokenizer.state_dict())

    # -- a step ------------------------------------------------------------------------------------

    def batches(self, images, *others):
        """Yield this process's share of the step's batch as one Batch per micro-batch.

        The gradients of the micro-batches add up to the gradient of the share.
        """
        size = self.processes.share // self.parts
        micro_batches = list(zip(*(tensor.split(size) for tensor in (images, *others))))
        is_split = len(micro_batches) > 1 or self.processes.world > 1
        global_mean = (
            self._global_mean([images for images, *_ in micro_batches])
            if is_split and "tokenizer" in self.averages
            else None
        )
        for i, micro_batch in enumerate(micro_batches):
            rows = self.processes.rows(i, self.parts)
            if is_split:  # a seed per micro-batch, so that their dropout differs
                seed = step_seed(self.config.seed, self.step)
                torch.manual_seed(derived_seed(seed, rows.start))
            batch = self.observe(*micro_batch)
            batch.global_mean = global_mean
            batch.dropped = self._dropped(len(batch.labels), rows if is_split else None)
            yield batch

    def _dropped(self, count, rows):
        """Draw which of `count` class conditions are dropped: (count,) bool.

        With `rows`, the slice of the full batch that a micro-batch takes, the draw is made for the
        full batch, so that it does not depend on the split.
        """
        share = self.config.generator.class_dropout
        if self.generator is None or share == 0:
            return None
        if rows is None:
            return torch.rand(count, device=self.device) < share
        rng = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, self.step))
        return torch.rand(self.config.batch_size, generator=rng, device=self.device)[rows] < share

    def _global_mean(self, image_batches):
        """Return the function from a micro-batch's mean code usage (K,) to the full batch's: see
        `entropy_loss`.
        """
        if len(image_batches) == 1:
            return self.processes.mean
        # an extra encoder pass over all micro-batches, before the first one trains
        with torch.no_grad(), self.autocast():
            means = [self.tokenizer.mean_use(images.to(self.device)) for images in image_batches]
        global_mean = self.processes.mean(torch.stack(means).mean(0))
        return lambda mean: global_mean

    def autocast(self):
        """Return the autocast context of this run's precision."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def observe(self, images, labels, indices=None, target=None):
        """Run the tokenizer and the teacher once, and return the Batch that all updates share.

        Nothing is run if training.cached has looked up their outputs, `indices` (B, L) and `target`
        (B, L, C).
        """
        batch = Batch(images.to(self.device), labels.to(self.device))
        if indices is not None:
            batch.indices = indices.to(self.device)
            batch.target = None if target is None else target.to(self.device)
            return batch
        if self.teacher_features is not None:
            batch.target = self.features(batch.images)
        if self.config.trains("tokenizer"):
            with self.autocast():
                batch.tokenized = self.tokenizer(batch.images)
            batch.indices = batch.tokenized.quantized.indices
        elif self.tokenizer is not None:
            with torch.no_grad():
                batch.indices = self.tokenizer.encode(batch.images, check=False).flatten(1)
        return batch

    @torch.no_grad()
    def features(self, images):
        """Return the teacher's features (B, L, C) of images (B, 3, H, W).

        On a GPU the teacher runs in the run's precision, on a CPU in float32.
        """
        is_bf16 = self.device.type == "cuda" and self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            return self.teacher_features(images, check=False)

    def backward(self, name, losses, weights):
        """Add the gradient of the weighted sum of `losses` to the gradients of optimizer `name`.

        A term without an entry in `weights` has weight 1. Returns the losses as detached scalars.
        """
        with torch.autocast(self.device.type, enabled=False):
            (
                sum(weights.get(term, 1.0) * value for term, value in losses.items()) / self.parts
            ).backward()
        terms = self.terms.setdefault(name, {})
        for term, value in losses.items():
            terms[term] = terms.get(term, 0.0) + value.detach() / self.parts
        return {term: value.detach() for term, value in losses.items()}

    def discard(self):
        """Clear the gradients and losses of this step so far."""
        self.terms = {}
        for optimizer in self.optimizers.values():
            optimizer.clear()

    def descend(self):
        """Step every optimizer that has a gradient; returns the losses of the step, {term: scalar
        on the device}.

        Raises FloatingPointError if a value is not finite. It names the first such loss term or, if
        all terms are finite, the gradient norm. No weight has changed then.
        """
        terms, self.terms = self.terms, {}
        for name in terms:
            self.processes.average(self.optimizers[name].gradients)
        checked = {
            (name, f"'{term}'"): value
            for name, values in terms.items()
            for term, value in values.items()
        }
        checked |= {
            (name, "the norm of the gradient"): self.optimizers[name].clip_gradients()
            for name in terms
        }
        finite_shares = self.processes.mean(
            torch.stack([torch.isfinite(value).float() for value in checked.values()])
        )
        # tolist() is the only place where a step waits for the device
        for (name, what), finite_share in zip(checked, finite_shares.tolist()):
            if finite_share < 1:
                self.discard()
                summed_terms = "" if what.startswith("'") else f" (of {', '.join(terms[name])})"
                raise FloatingPointError(
                    f"{what} of the {name} is {checked[name, what].item()} at step "
                    f"{self.step}{summed_terms}"
                )
        for name in terms:
            self.optimizers[name].step(
                learning_rate_factor(self.config.optimizer, self.step, self.config.steps)
            )
        return {term: value for values in terms.values() for term, value in values.items()}

    def finish_step(self):
        """Update the averages and count the step."""
        for name, average in self.averages.items():
            average.update(self.networks[name])
        self.step += 1

    @property
    def gan_is_on(self):
        """Whether the adversarial term is part of the current step."""
        objective = self.config.objective
        return objective.gan_weight > 0 and self.step >= objective.gan_start * self.config.steps

    # -- to and from a checkpoint ------------------------------------------------------------------

    @property
    def modules(self):
        """The networks, and their averages under the names NAME_ema."""
        return self.networks | {
            f"{name}_ema": average.module for name, average in self.averages.items()
        }

    def tensors(self):
        """Return the tensors of a checkpoint, {file: {name: tensor}}.

        The file "networks" contains `modules`, the file "optimizers" the optimizers' moments. The
        process that writes gets full tensors, the others get {file: {}}. Every process has to call
        this.
        """
        networks = {
            f"{name}.{k}": v
            for name, module in self.modules.items()
            for k, v in module.state_dict().items()
        }
        optimizers = {
            f"{name}.{k}": v for name, o in self.optimizers.items() for k, v in o.tensors().items()
        }
        return {
            "networks": self.processes.gather(networks),
            "optimizers": self.processes.gather(optimizers),
        }

    def restore(self, run):
        """Load the run's newest checkpoint; returns its JSON state."""
        saved = run.load_state()
        weights = load_networks(run)
        for name, module in self.modules.items():
            current = module.state_dict()
            tensors = {
                key: shard_like(tensor, current.get(key))
                for key, tensor in network(weights, name, run.name).items()
            }
            load_module(module, tensors, run.name)
        moments = load_networks(run, "optimizers")
        for name, optimizer in self.optimizers.items():
            # an optimizer that has not stepped yet has no moments
            optimizer.load_tensors(moments.get(name, {}), f"{run.name}/{name}")
        self.step = saved["step"]
        return saved


def _finished_parent(source):
    """Return `source`, the parent's run name or file; raises UserError if the run is not
    finished.
    """
    if is_file(source):
        return source
    run = Run.open(source)
    if run.checkpoint_steps() and not run.is_finished:
        raise UserError(
            f"the parent '{source}' is at step {run.step} of {run.config['steps']}: finish it with "
            f"`gear train {source}`."
        )
    return source
