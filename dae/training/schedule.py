"""The optimiser and its learning rate: AdamW with two groups, linear warm-up and a cosine (sec. 3.2).

The rate is a pure function of the step, so a resumed run has no scheduler state to restore.
"""

from collections.abc import Iterator

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from dae.config import OptimConfig


def warmup_steps(config: OptimConfig) -> int:
    """At most a tenth of the run: with the paper's 500, twenty steps would never leave the warm-up."""
    return min(config.warmup, config.steps // 10)


def due(step: int, every: int, steps: int) -> bool:
    """At every `every`-th step (0: at every tenth of the run), and at the last."""
    return step % (every or max(1, steps // 10)) == 0 or step == steps


class Schedule:
    """Learning rate of step 0, 1, ..., steps - 1. timm's cosine behind its linear warm-up."""

    def __init__(self, config: OptimConfig) -> None:
        warmup = warmup_steps(config)
        # timm's scheduler wants an optimiser; a dummy one keeps the rate a function of the step alone.
        dummy = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
        self._timm = CosineLRScheduler(
            dummy, t_initial=max(1, config.steps - warmup), lr_min=config.lr_min, warmup_t=warmup,
            warmup_lr_init=config.lr / (warmup + 1), warmup_prefix=True, t_in_epochs=False,
        )  # fmt: skip

    def lr_at(self, step: int) -> float:
        """The first step already moves: warm-up starts at lr / (warmup + 1), not at 0."""
        return float(self._timm._get_lr(step)[0])


def adamw(named: Iterator[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; matrices and kernels decay, while norms, biases, position bias tables and mask tokens do not."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named:
        keeps = parameter.ndim <= 1 or name.endswith("bias_table")
        (others if keeps else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr)
