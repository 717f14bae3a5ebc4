"""Autocast: which numbers the network computes in. Losses and CMCL are always in float32."""

import torch

from dae.errors import InputError


def autocast_type(amp: str, device: torch.device) -> torch.dtype | None:
    """The type for autocast, or None for plain float32.

    auto is bf16 where the device is faster in it. Of CPUs those are the ones with AMX or
    AVX512-BF16. With AVX512-BF16 alone a small training step took 0.7 to 0.9 of its time in
    float32; with neither, 40 times as long. Raises InputError on what the device cannot do.
    """
    if amp == "off":
        return None
    if amp == "fp16":
        if device.type == "cpu":
            raise InputError("--amp fp16: needs a GPU; take bf16 or off")
        return torch.float16
    if amp == "auto" and not has_fast_bf16(device):
        return None
    return torch.bfloat16


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def grad_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """fp16 gradients underflow without one; bf16 and float32 need none.

    A step whose gradients overflow is skipped and the scale halved, until they fit; AdamW does not
    count it, and the rate goes on by the step. The scale is saved with the run.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def may_skip(scaler: torch.amp.GradScaler) -> bool:
    """Whether the scaler skips an infinite gradient: in fp16, up to 17 times in a row."""
    return scaler.is_enabled() and scaler.get_scale() >= 1
