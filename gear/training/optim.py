"""Optimizers, their schedule, and the exponential moving average of weights."""

import copy

import torch

from gear.training.fsdp import is_shard, local, spread_like, whole
from gear.weights import check_shapes


def learning_rate_factor(config, step, steps):
    """Return the factor, in (0, 1], of the learning rate: linear warm-up, constant, linear decay.

    No LambdaLR of torch's: it counts the steps itself, and a checkpoint would have to keep its
    count.
    """
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    start = config.decay_from * steps
    progress = 0.0 if step < start else (step - start) / max(steps - start, 1)
    return warmup * (1 + progress * (config.decay_to - 1))


class Optimizer:
    """AdamW over the parameters of one or more modules, with gradient clipping over all of them
    together.

    Shards are a group of their own: torch's multi-tensor operations take no mixture.
    """

    def __init__(self, modules, lr, config):
        self.parameters = [p for module in modules for p in module.parameters()]
        kinds = [
            [p for p in self.parameters if is_shard(p) == sharded] for sharded in (False, True)
        ]
        groups = [{"params": parameters} for parameters in kinds if parameters]
        self.fused = all(p.device.type == "cuda" for p in self.parameters)
        self.adam = torch.optim.AdamW(
            groups, lr=lr, betas=(0.9, config.beta2), weight_decay=0.0, fused=self.fused or None
        )
        self.lr, self.clip = lr, config.clip

    @property
    def gradients(self):
        """The gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip_gradients(self):
        """Scale the gradients to a norm of at most `clip`; returns the norm before, a scalar on
        their device.
        """
        groups = [group["params"] for group in self.adam.param_groups]
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for group in groups
        ]
        norm = (
            norms[0]
            if len(norms) == 1
            else torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
        )
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self.clip, norm)
        return norm

    def step(self, factor):
        """Step at `factor` times the learning rate, and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        self.clear()

    def clear(self):
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def tensors(self):
        """Return the state as {name: tensor}, to be written as safetensors; that of a shard is a
        shard.
        """
        states = enumerate(self.adam.state.get(p, {}) for p in self.parameters)
        return {
            f"{i}.{key}": torch.as_tensor(value)
            for i, state in states
            for key, value in state.items()
        }

    def load_tensors(self, tensors, source="the checkpoint"):
        """Load what `tensors` returned, whole (nothing, if it had not stepped yet).

        Raises UserError listing what does not fit.
        """
        expected = {}
        for i, parameter in enumerate(self.parameters if tensors else ()):
            shape = tuple(parameter.shape)
            expected |= {f"{i}.step": (), f"{i}.exp_avg": shape, f"{i}.exp_avg_sq": shape}
        check_shapes(expected, tensors, source, type(self).__name__)
        self.adam.state.clear()
        for name, value in tensors.items():
            i, key = name.split(".")
            parameter = self.parameters[int(i)]
            if key != "step":
                value = spread_like(value.to(parameter.device, parameter.dtype), parameter)
                # in its memory format, else torch takes a slow path
                value = torch.empty_like(parameter).copy_(value)
            # a number, on the CPU else
            self.adam.state[parameter][key] = value.to(parameter.device) if self.fused else value


class EMA:
    """theta_ema <- decay theta_ema + (1 - decay) theta after every step; buffers are copied.

    No AveragedModel of torch's: it takes no network of which some parameters are shards and some
    are not.
    """

    def __init__(self, module, decay):
        self.module, self.decay = copy.deepcopy(module).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module):
        mine, theirs = ([local(p) for p in m.parameters()] for m in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers()):
            mine.copy_(theirs)
