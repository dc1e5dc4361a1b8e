"""What fake quantization trains for: the dtypes torchao serves, and its configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raytrain_adv.errors import JobError

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

FLOAT8 = "float8_e4m3fn"
GROUP_SIZES = (8, 16, 32, 64, 128, 256, 512)
SERVED = (
    "weights int8, int4, int3 or int2 with activations int8 or none, in groups or per channel; "
    "weights float8_e4m3fn with activations float8_e4m3fn or none, per channel"
)
NOT_SERVED = {
    "nvfp4": "NVFP4 needs Blackwell GPUs, in training as in serving",
    "mxfp4": "MX formats need Blackwell GPUs, in training as in serving",
    "mxfp8": "MX formats need Blackwell GPUs, in training as in serving",
    "int1": "torchao has no fake quantization below two bits",
    "float8_e5m2": "torchao serves float8 weights as e4m3 only",
    "fp8": "its name is float8_e4m3fn",
}
"""Dtypes that are not supported, and why."""


def refuse_odd_groups(size: int | None, widths: Mapping[str, int]) -> None:
    """Refuse a group size that does not divide each layer's input features (`widths`).

    Raises:
        JobError: naming a layer, and the sizes that fit all of them.
    """
    odd = {fqn: width for fqn, width in widths.items() if size and width % size}
    if not odd:
        return
    fqn, width = next(iter(odd.items()))
    fit = [str(n) for n in GROUP_SIZES if all(w % n == 0 for w in widths.values())]
    raise JobError(
        f"qat_group_size: {size} does not divide every layer",
        f"{fqn} has {width} features, and {len(odd) - 1} more do not divide",
        f"set qat_group_size: {' or '.join([*fit, 'null (one scale per channel)'])}, or leave "
        "layers out with qat_exclude",
    )


def config_of(weight_dtype: str, group_size: int | None, activation_dtype: str) -> AOBaseConfig:
    """Return torchao's configuration of a layer: trained for, converted to, and exported.

    Args:
        weight_dtype: int8, int4, int3, int2 or float8_e4m3fn.
        group_size: input features that share a scale; none means all of them.
        activation_dtype: int8, float8_e4m3fn, or empty for none.
    """
    import torch
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerRow,
    )

    from raytrain_adv.ops.fake_quant.rounding import EPS

    config: AOBaseConfig
    granularity = PerGroup(group_size) if group_size else PerAxis(0)
    if weight_dtype == FLOAT8 and activation_dtype:
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=EPS
        )
    elif weight_dtype == FLOAT8:
        config = Float8WeightOnlyConfig()
    elif activation_dtype:
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, weight_dtype), weight_granularity=granularity
        )
    else:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, weight_dtype), granularity=granularity
        )
    return config
