"""The optimizers of the PyTorch engine: AdamW from torch or bitsandbytes, and Muon for matrices beside AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smolmlx.plan import Plan

# Muon (Jordan et al. 2024): momentum, and the quintic that brings every singular value near 1 in five rounds.
_MOMENTUM, _ROUNDS = 0.95, 5
_A, _B, _C = 3.4445, -4.7750, 2.0315


def make_optimizer(plan: Plan, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the plan's optimizer over groups: matrices, which decay, norms and biases, which do not, and muon's matrices."""
    train = plan.recipe.train
    matrices = {name for name, p in parameters.items() if plan.trains_with_muon(name, p.ndim)}
    rest = [p for name, p in parameters.items() if name not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {
            "params": [parameters[name] for name in parameters if name in matrices],
            "weight_decay": train.weight_decay,
            "lr": train.learning_rate * plan.muon_ratio,
            "muon": True,
        },
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
        return optimizer
    if train.optimizer == "muon":
        return MuonWithAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True if train.optimizer == "adamw_fused" else None)


class MuonWithAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW, but Muon for the groups marked `muon`.

    torch.optim.Muon does not serve: it has no AdamW half, and orthogonalizes in bfloat16, which the other engine's float32
    could not match.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            if group.get("muon")
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for _, parameter, _ in held:
            parameter.grad = None  # AdamW passes these by
        result = super().step(closure)
        for group, parameter, gradient in held:
            parameter.grad = gradient
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonalized(gradient.lerp(momentum, _MOMENTUM))  # Nesterov
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return result


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix [n, m] with its singular values brought near 1, times sqrt(max(1, n/m))."""
    rows, columns = matrix.shape
    x = (matrix.T if rows > columns else matrix).float()
    x = x / (x.norm() + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.T if rows > columns else x) * max(1.0, rows / columns) ** 0.5
