"""Quantisation to FP8 (e4m3) in groups of 128 channels, as the low-latency dispatch does it on the way out.

For each token and group: ``amax = max(1e-4, max |x|)``, in float32.

- plain: ``scale = amax * (1 / 448)``, data = ``x * (448 / amax)``;
- rounded: ``scale = 2^e`` with the smallest e such that ``2^e >= amax * (1 / 448)``, data = ``x * 2^-e``;

data rounded to nearest even and saturated at +-448. ``x ~ data * scale``. UE8M0 keeps the eight exponent bits of a
rounded scale, ``e + 127``, four groups in an int32, the lowest group in the lowest byte.

A NaN stays one, positive, and does not count for ``amax``. Where a group has an infinity, that becomes a NaN and the
finite numbers 0; ``scale`` is infinite, or 2^127 if rounded.

Legend of dims: T tokens, H hidden, S = H / 128 groups.
"""

from __future__ import annotations

import torch

GROUP = 128
_E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-4


def quantise(x: torch.Tensor, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [T, H] rows, H a multiple of 128.

    Returns:
        float8_e4m3fn [T, H] and float32 scales [T, S] to multiply it with.
    """
    num_tokens, hidden = x.shape
    groups = x.float().view(num_tokens, hidden // GROUP, GROUP)
    size = groups.abs()
    amax = size.amax(2)
    amax_is_finite = bool(amax.isfinite().all())
    if not amax_is_finite:
        amax = size.nan_to_num_(0.0, posinf=torch.inf).amax(2)
    amax.clamp_(min=_SMALLEST_AMAX)
    most = torch.tensor(_E4M3_MAX, dtype=torch.float32, device=x.device)
    scale = amax * most.reciprocal()
    if round_scale:
        scale = round_up_to_power_of_two(scale)
        factor = torch.where(amax.isinf(), 0.0, scale.reciprocal())
    else:
        factor = most / amax  # a Python number over a tensor would be rounded twice
    scaled = (groups * factor.unsqueeze(2)).clamp_(-_E4M3_MAX, _E4M3_MAX)
    if not amax_is_finite:
        scaled = torch.where(scaled.isnan(), torch.nan, scaled)
    data = scaled.to(torch.float8_e4m3fn)
    return data.view(num_tokens, hidden), scale


def round_up_to_power_of_two(value: torch.Tensor) -> torch.Tensor:
    """The smallest power of two not below each positive float32 value, 2^127 at most.

    Its exponent, plus one if bits are left.
    """
    bits = value.view(torch.int32)
    exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp_(max=254)
    return (exponent << 23).to(torch.int32).view(torch.float32)


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """int32 [T, ceil(S / 4)] from float32 [T, S] powers of two; bytes past the last group are zero."""
    num_tokens, groups = scales.shape
    exponents = scales.view(torch.int32) >> 23
    padded = torch.zeros((num_tokens, -(-groups // 4) * 4), dtype=torch.uint8, device=scales.device)
    padded[:, :groups] = exponents.to(torch.uint8)
    return padded.view(torch.int32)
