"""AdamW over the trained parameters, addressed by name, with the learning rate of each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from understudy.errors import CheckpointError
from understudy.losses.schedules import learning_rate
from understudy.trainer.settings import Train


class Optimizer:
    """AdamW (arXiv 1711.05101); matrices decay, vectors (norms, biases) do not. Its state is keyed by parameter names."""

    def __init__(self, model: nn.Module, settings: Train) -> None:
        self._settings = settings
        self._named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = [value for value in self._named.values() if value.dim() >= 2]
        vectors = [value for value in self._named.values() if value.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self._named.values())

    def clip(self) -> float:
        """The 2-norm of the gradient; where it is above `max_grad_norm` the gradient is scaled down to that."""
        limit = self._settings.max_grad_norm
        norm = nn.utils.get_total_norm([value.grad for value in self.parameters if value.grad is not None])
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return float(norm)

    def step(self, step: int) -> float:
        """One update with the learning rate of optimizer step `step`, which is returned."""
        settings = self._settings
        rate = learning_rate(
            step,
            peak=settings.lr,
            num_steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            shape=settings.schedule,
            final_share=settings.final_lr_share,
        )
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        return rate

    def zero_grad(self) -> None:
        """Drops the gradients and frees their memory."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`{parameter name/key: tensor}`."""
        return {
            f"{name}/{key}": value.contiguous()
            for name, parameter in self._named.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned. Raises CheckpointError where it belongs to other parameters."""
        names = {name.rpartition("/")[0] for name in state}
        differing = sorted(names - set(self._named))
        if differing:
            raise CheckpointError(f"the optimizer state belongs to other parameters, first {differing[0]!r}")
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            parameter = self._named[name]
            device = torch.device("cpu") if field == "step" and parameter.device.type == "cpu" else parameter.device
            self._adamw.state[parameter][field] = value.to(device)
