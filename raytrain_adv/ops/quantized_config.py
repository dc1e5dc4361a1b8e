"""torchao's configurations of what fake quantisation trains for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

FLOAT8 = "float8_e4m3fn"


def config_of(weight_dtype: str, group_size: int | None, activation_dtype: str) -> AOBaseConfig:
    """Return torchao's configuration of a layer: what is trained for, converted to and written into
    the exported config.json.

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

    from raytrain_adv.ops.fake_quantize import EPS

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
