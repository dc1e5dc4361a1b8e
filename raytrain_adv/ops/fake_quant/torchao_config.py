"""What fake quantization trains for: the dtypes torchao serves, and its configurations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raytrain_adv.errors import JobError
from raytrain_adv.ops.fake_quant.targets import FLOAT8

if TYPE_CHECKING:
    from torch import Tensor
    from torchao.core.config import AOBaseConfig

GROUP_SIZES = (8, 16, 32, 64, 128, 256, 512)
SERVED = (
    "weights int8, int4, int3 or int2 with activations int8 or none, in groups or per channel; "
    "weights float8_e4m3fn with activations float8_e4m3fn or none, per channel"
)
NOT_SERVED = {
    "mxfp8": "MX formats need Blackwell GPUs, in training as in serving",
    "int1": "torchao has no fake quantization below two bits",
    "float8_e5m2": "torchao serves float8 weights as e4m3 only",
    "fp8": "its name is float8_e4m3fn",
}
"""Dtypes that are not supported, and why."""
DEPRECATION = "Config Deprecation: _default"
"""Of the warning by torchao 0.18 that _default will go. It is what engines that fuse q, k and v
into one linear find that linear's configuration by; without it they would need its name.
"""


def refuse_odd_groups(
    size: int | None, widths: Mapping[str, int], taken: Sequence[int | None] = (*GROUP_SIZES, None)
) -> None:
    """Refuse a group size that does not divide each layer's input features (`widths`). Raises
    JobError naming a layer, and the sizes among `taken` that fit all of them.
    """
    odd = {fqn: width for fqn, width in widths.items() if size and width % size}
    if not odd:
        return
    fqn, width = next(iter(odd.items()))
    fit = [str(n) for n in taken if n and all(w % n == 0 for w in widths.values())]
    fit += ["null (one scale per channel)"] if None in taken else []
    sets = f"set qat_group_size: {' or '.join(fit)}, or " if fit else ""
    raise JobError(
        f"qat_group_size: {size} does not divide every layer",
        f"{fqn} has {width} features, and {len(odd) - 1} more do not divide",
        f"{sets}leave layers out with qat_exclude",
    )


def config_of(weight_dtype: str, group_size: int | None, activation_dtype: str) -> AOBaseConfig:
    """Return torchao's configuration of a layer: trained for, converted to, and exported. Without
    a group size all input features share a scale; `activation_dtype` is empty for none.
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


def tensor_of(weight: Tensor, config: AOBaseConfig, axis: int = -1) -> Tensor:
    """Return a weight [rows, columns] as the tensor that torchao's configuration makes of it, or
    stacked ones, each of which is rounded alike; `axis` has the input features.
    """
    import torch
    from torch import nn
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        quantize_,
    )

    with torch.no_grad():
        if isinstance(config, Float8WeightOnlyConfig | Float8DynamicActivationFloat8WeightConfig):
            return _float8(weight, config, axis)
        if weight.ndim == 3:
            return _stacked_integers(weight, config, axis)
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config, filter_fn=lambda module, fqn: True)
    return linear.weight.data


def _stacked_integers(weight: Tensor, config: Any, axis: int) -> Tensor:
    """Return the tensor of stacked matrices, which quantize_ takes no integers of."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
    )
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization as Activation,
    )

    rounds = isinstance(config, Int8DynamicActivationIntxWeightConfig)
    granularity = config.weight_granularity if rounds else config.granularity
    grouped = isinstance(granularity, PerGroup)
    block = [1, 1, 1]
    block[axis] = granularity.group_size if grouped else weight.shape[axis]
    activations = Activation.INT8_ASYM_PER_TOKEN.value if rounds else None
    tensor: Tensor = IntxUnpackedToInt8Tensor.from_hp(
        weight, tuple(block), config.weight_dtype, activation_quantization=activations
    )
    return tensor


def _float8(weight: Tensor, config: Any, axis: int) -> Tensor:
    """Return what torchao's two float8 configurations make of a weight.

    Not by quantize_: it makes NaN of rows of zeros (pytorch/ao#4713), and requires a GPU where only
    the product needs one. Remove when it does neither.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    from raytrain_adv.ops.fake_quant.rounding import EPS

    of_rows = PerRow(axis) if weight.ndim == 3 else PerRow()
    keys: dict[str, Any] = {"granularity": of_rows}
    if isinstance(config, Float8DynamicActivationFloat8WeightConfig):
        of_activations, _ = config.granularity
        keys |= {
            "mm_config": config.mm_config,
            "kernel_preference": config.kernel_preference,
            "act_quant_kwargs": QuantizeTensorToFloat8Kwargs(
                config.activation_dtype,
                of_activations,
                hp_value_lb=config.activation_value_lb,
                hp_value_ub=config.activation_value_ub,
                kernel_preference=config.kernel_preference,
            ),
        }
    tensor: Tensor = Float8Tensor.from_hp(
        weight, float8_dtype=config.weight_dtype, hp_value_lb=EPS, **keys
    )
    return tensor


def describe_model(
    linears: Iterable[str], configs: Mapping[str, AOBaseConfig], default: AOBaseConfig
) -> dict[str, Any]:
    """Return what an exported config.json has for transformers: the configuration of each converted
    tensor, by its name in the model, none for the other `linears`, and the default, for linears
    that are none of these, as those that an engine fuses.
    """
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    converted = {name.removesuffix(".weight"): config for name, config in configs.items()}
    every = dict.fromkeys(linears)
    others = {name: config for name, config in converted.items() if name not in every}
    tables = any(f"{name}.weight" in configs for name in others)
    alone = {name: None for name in every if name not in converted}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=DEPRECATION)
        by_fqn = FqnToConfig({**others, **alone, "_default": default})
    config: Any = TorchAoConfig(by_fqn, include_input_output_embeddings=tables)
    return {"quantization_config": config.to_dict()}
