"""Optimizers, the learning-rate schedule, and the exponential moving average of weights."""

import copy

import torch

from gear.training.fsdp import full_tensor, is_shard, local_tensor, shard_like
from gear.weights import check_shapes


def learning_rate_factor(config, step, steps):
    """Return the factor of the learning rate, in (0, 1]: linear warm-up, constant, linear decay.

    torch's LambdaLR is not used, because it counts steps itself and its count would have to be
    saved in every checkpoint.
    """
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    start = config.decay_from * steps
    progress = 0.0 if step < start else (step - start) / max(steps - start, 1)
    return warmup * (1 + progress * (config.decay_to - 1))


class Optimizer:
    """AdamW over the parameters of one or more modules, with one gradient norm for all of them.

    Shards form their own parameter group, because torch's multi-tensor operations cannot mix shards
    with plain tensors.
    """

    def __init__(self, modules, lr, config):
        self.parameters = [p for module in modules for p in module.parameters()]
        by_kind = [
            [p for p in self.parameters if is_shard(p) == sharded] for sharded in (False, True)
        ]
        groups = [{"params": parameters} for parameters in by_kind if parameters]
        self.fused = all(p.device.type == "cuda" for p in self.parameters)
        self.adam = torch.optim.AdamW(
            groups, lr=lr, betas=(0.9, config.beta2), weight_decay=0.0, fused=self.fused or None
        )
        self.lr, self.clip = lr, config.clip

    @property
    def gradients(self):
        """The gradients of all parameters that have one."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip_gradients(self):
        """Scale the gradients to a norm of at most `clip`; returns the norm before scaling, a
        scalar on their device.
        """
        groups = [group["params"] for group in self.adam.param_groups]
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for group in groups
        ]
        norm = (
            norms[0]
            if len(norms) == 1
            else torch.linalg.vector_norm(torch.stack([full_tensor(norm) for norm in norms]))
        )
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self.clip, norm)
        return norm

    def step(self, factor):
        """Take a step at `factor` times the learning rate, and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        self.clear()

    def clear(self):
        """Clear the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def tensors(self):
        """Return the state as {name: tensor}, for a safetensors file; the state of a shard is a
        shard too.
        """
        states = enumerate(self.adam.state.get(p, {}) for p in self.parameters)
        return {
            f"{i}.{key}": torch.as_tensor(value)
            for i, state in states
            for key, value in state.items()
        }

    def load_tensors(self, tensors, source="the checkpoint"):
        """Load the full tensors of a state that `tensors` returned; they are empty if no step had
        been taken.

        Raises UserError that lists the tensors that do not fit.
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
                value = shard_like(value.to(parameter.device, parameter.dtype), parameter)
                # the parameter's memory format, because torch is slow with any other
                value = torch.empty_like(parameter).copy_(value)
            # a fused optimizer needs its step count on the device, any other on the CPU
            self.adam.state[parameter][key] = value.to(parameter.device) if self.fused else value


class EMA:
    """An exponential moving average of a network's weights.

    After every step, theta_ema <- decay theta_ema + (1 - decay) theta; buffers are copied. torch's
    AveragedModel is not used, because it cannot mix shards with plain tensors in one network.
    """

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module):
        averages, weights = (
            [local_tensor(p) for p in m.parameters()] for m in (self.module, module)
        )
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for average_buffer, buffer in zip(self.module.buffers(), module.buffers()):
            average_buffer.copy_(buffer)
