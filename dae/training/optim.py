"""The optimiser and its learning rate: AdamW, linear warm-up and a cosine (sec. 3.2).

Both rates are pure functions of the step, so a resumed run has no scheduler state to restore.
A gradient that is far too large is clipped (--clip) and then moves no weight by more than about 3
times the rate: what AdamW makes of a first large gradient.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dae.config.shared import OptimConfig

Named = Iterable[tuple[str, nn.Parameter]]

FROZEN = ("frozen-encoder", "probe")  # schedules that never move the encoder


def due(step: int, every: int, steps: int, *, most: int = 2**31) -> bool:
    """Whether to do at this step what is done every so many steps, and at the last one.

    every: 0 means every tenth of the run, but at least every `most`-th step.
    """
    if not every:
        every = min(most, max(1, steps // 10))
    return step % every == 0 or step == steps


# --- the learning rate


def warmup_steps(config: OptimConfig) -> int:
    """At most a tenth of the run: twenty steps would never leave the warm-up of the paper's 500."""
    return min(config.warmup, config.steps // 10)


def half_cosine(step: int, steps: int) -> float:
    """From 1 at step 0 down to 0 at step `steps`, which comes after the last one."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of pre-training at a step: up to `lr` in a line, down to `lr_min` along a cosine."""
    warmup = warmup_steps(config)
    if step < warmup:
        # The first step already moves: the warm-up starts at lr / (warmup + 1), not at 0.
        first = config.lr / (warmup + 1)
        return first + step * ((config.lr - first) / warmup)

    falling = half_cosine(step - warmup, config.steps - warmup)
    return config.lr_min + (config.lr - config.lr_min) * falling


def fine_tuning_factors(schedule: str, step: int, steps: int, warmup: int) -> tuple[float, float]:
    """What the peak rate is multiplied by at a step: (for the encoder, for the decoder).

    plain           cosine from the first step
    warmup          linear warm-up, then cosine
    frozen-encoder  the same, and the encoder never moves; the same for `probe`
    decoder-first   the decoder alone for a tenth of the run, up and down; then both as `warmup`
    """
    if schedule == "plain":
        factor = half_cosine(step, steps)
        return factor, factor

    if schedule == "decoder-first":
        alone = max(2, steps // 10)
        if step < alone:
            return 0.0, warmup_factor(step, alone, alone // 2)
        factor = warmup_factor(step - alone, steps - alone, warmup)
        return factor, factor

    factor = warmup_factor(step, steps, warmup)
    if schedule in FROZEN:
        return 0.0, factor
    return factor, factor


def warmup_factor(step: int, steps: int, warmup: int) -> float:
    """Up to 1 in `warmup` steps, then down along the cosine.

    The warm-up is the line of `learning_rate` in other roundings. Both keep theirs, so that a run
    repeats to the last bit what an earlier version logged.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return half_cosine(step - warmup, steps - warmup)


# --- the optimiser


def adamw(named: Named, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups: those that decay, then those that do not."""
    return adamw_over(decay_groups(named, config.weight_decay), config)


def adamw_in_parts(named: Named, config: OptimConfig) -> torch.optim.AdamW:
    """As `adamw`, but the encoder has its own two groups. Every group names its `part`."""
    encoder: list[tuple[str, nn.Parameter]] = []
    decoder: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named:
        part = encoder if name.startswith("encoder.") else decoder
        part.append((name, parameter))

    of_encoder = decay_groups(encoder, config.weight_decay)
    of_decoder = decay_groups(decoder, config.weight_decay)
    optimizer = adamw_over([*of_encoder, *of_decoder], config)
    for n, group in enumerate(optimizer.param_groups):
        group["part"] = "encoder" if n < len(of_encoder) else "decoder"
    return optimizer


def adamw_over(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """On a GPU, AdamW as one kernel over all parameters; on a CPU, as torch has it by default."""
    is_on_gpu = True
    for group in groups:
        is_on_gpu = is_on_gpu and all(parameter.is_cuda for parameter in group["params"])

    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(0.9, 0.999),  # "momentum 0.9" (sec. 3.2) is the first of them
        fused=is_on_gpu,
    )


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay. Norms, biases, position bias tables and mask tokens do not.

    A checkpoint numbers the moments of the parameters in the order of these two groups. That is why
    timm's param_groups_weight_decay is not used: it leaves out frozen parameters, makes one group
    of all where weight_decay is 0, and puts the second group first.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.ndim <= 1 or name.endswith("bias_table"):
            others.append(parameter)
        else:
            decayed.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
