"""The optimiser and its learning rate: AdamW with two groups, linear warm-up and a cosine (sec. 3.2).

The rate is a pure function of the step, so a resumed run has no scheduler state to restore.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from dae.config.shared import OptimConfig


def warmup_steps(config: OptimConfig) -> int:
    """At most a tenth of the run: with the paper's 500, twenty steps would never leave the warm-up."""
    return min(config.warmup, config.steps // 10)


def due(step: int, every: int, steps: int, *, most: int = 2**31) -> bool:
    """At every `every`-th step (0: at every tenth of the run, or every `most`-th), and at the last."""
    return step % (every or min(most, max(1, steps // 10))) == 0 or step == steps


class Schedule:
    """Learning rate of step 0, 1, ..., steps - 1. timm's cosine behind its linear warm-up."""

    def __init__(self, config: OptimConfig) -> None:
        warmup = warmup_steps(config)
        # timm's scheduler wants an optimiser; a dummy one keeps the rate a function of the step alone.
        dummy = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
        self._timm = CosineLRScheduler(
            dummy,
            t_initial=max(1, config.steps - warmup),
            lr_min=config.lr_min,
            warmup_t=warmup,
            warmup_lr_init=config.lr / (warmup + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )

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
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=on_a_gpu(groups))


def on_a_gpu(groups: Sequence[dict[str, Any]]) -> bool:
    """There AdamW runs as one kernel over all parameters; on a CPU as torch has it by default."""
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def adamw_in_parts(
    named: Iterator[tuple[str, nn.Parameter]], config: OptimConfig
) -> torch.optim.AdamW:
    """As `adamw`, the encoder's groups apart from the others; each group says its `part`."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {"encoder": [], "decoder": []}
    for name, parameter in named:
        parts["encoder" if name.startswith("encoder.") else "decoder"].append((name, parameter))
    groups: list[dict[str, Any]] = []
    for part, members in parts.items():
        groups += [{**group, "part": part} for group in adamw(iter(members), config).param_groups]
    return torch.optim.AdamW(groups, lr=config.lr, fused=on_a_gpu(groups))


def fine_tuning_factors(kind: str, step: int, steps: int, warmup: int) -> tuple[float, float]:
    """What the learning rates of encoder and decoder are multiplied by at a step: a pure function of it.

    plain           cosine from the first step
    warmup          linear warm-up, then cosine
    frozen-encoder  the same, and the encoder never moves
    decoder-first   the decoder alone for a tenth of the run, up and down; then both as `warmup`
    """
    if kind == "plain":
        return (cosine(step, 0, steps, 0),) * 2
    if kind == "decoder-first":
        first = max(2, steps // 10)
        if step < first:
            return 0.0, cosine(step, 0, first, first // 2)
        return (cosine(step, first, steps, warmup),) * 2
    factor = cosine(step, 0, steps, warmup)
    return (0.0 if kind == "frozen-encoder" else factor), factor


def cosine(step: int, start: int, stop: int, warmup: int) -> float:
    """From `start` to `stop`: up to 1 in `warmup` steps, the first one not at 0, then down to 0 along a cosine."""
    at = step - start
    if at < warmup:
        return (at + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1, stop - start - warmup)))
