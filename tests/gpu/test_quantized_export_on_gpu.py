"""The quantized folder computes on a GPU what training computed there with fake quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_adv.export.model_folder import export_model
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.fake_quant.engine_rounding import (
    fake_quantize_inputs_of_experts,
    quantize_float4,
    quantize_float8_blocks,
    quantize_rows,
    quantize_tokens,
)
from raytrain_adv.ops.fake_quant.rounding import fake_quantize_groups, quantize_float8
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.finish import Exported
from tests.tiny_models import job_for, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
FLOAT8 = {
    "qat_weight_dtype": "float8_e4m3fn",
    "qat_group_size": None,
    "qat_quantize_embedding": False,
}
FP8 = {"fp8": True, "fp8_min_features": 16}
LORA = {"finetuning_type": "lora", "lora_rank": 8, "bf16": True, "pure_bf16": False}


def exported(place: Path, kind: str = "llama", **keys: Any) -> Exported:
    source = write_checkpoint(kind, place / "source", **SIZES)
    standard = {"enable_qat": True, "pure_bf16": True, **keys}
    job = job_for(source, place / "job", **standard)
    model = build(job)
    plans = Transforms(job).prepare(model)
    materialize(model, GPU)
    load_pretrained(model, job, GPU)
    Transforms(job).initialize(model, plans, 3)
    tokens = torch.arange(64) * 7 % 512
    return export_model(model, job, place / "model", input_ids=tokens)


@pytest.mark.parametrize(
    "keys",
    [
        {"qat_activation_dtype": "int8"},
        {"qat_weight_dtype": "int4", "qat_activation_dtype": "int8"},
        {"qat_weight_dtype": "int4", "qat_group_size": None},
        {"qat_weight_dtype": "int4", "qat_activation_dtype": "int8", **LORA},
        FLOAT8,
        {**FLOAT8, "qat_activation_dtype": "float8_e4m3fn"},
        {"qat_weight_dtype": "int4", "qat_activation_dtype": "int8", **FP8},
        {**FLOAT8, "qat_activation_dtype": "float8_e4m3fn", **FP8},
    ],
)
def test_it_computes_the_same_bits(tmp_path: Path, keys: dict[str, Any]) -> None:
    for kind in ("llama", "llama-tied"):
        written = exported(tmp_path / kind, kind, **keys)
        assert "on cuda" in written.figures()["quantized_comparison"]
        assert written.figures()["quantized_logit_difference"] == 0.0


ROUNDED: dict[str, Callable[[torch.Tensor], Any]] = {
    "int8 rows": quantize_rows,
    "int8 tokens": quantize_tokens,
    "int8 tokens of experts": lambda x: (fake_quantize_inputs_of_experts(x),),
    "float8 rows": quantize_float8,
    "float8 rows, scales in float32": lambda x: quantize_float8(x, in_float32=True),
    "float8 blocks": quantize_float8_blocks,
    "nvfp4": lambda x: quantize_float4(x, "nvfp4"),
    "mxfp4": lambda x: quantize_float4(x, "mxfp4"),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_rounds_what_a_gpu_trained_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """What was trained on a GPU may be exported where there is none."""
    weight = 0.02 * torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    weight[:3] = torch.tensor([0.0, 1e-11, 1e3])[:, None] * weight[:3]
    weight = weight.to(dtype)
    here, there = ROUNDED[name](weight), ROUNDED[name](weight.to(GPU))
    for own, other in zip(here, there, strict=True):
        assert torch.equal(own, other.cpu())


@pytest.mark.parametrize("size", [64, 100, 14336, 28672, 53248])
@pytest.mark.parametrize("name", [name for name in ROUNDED if "rows" in name or "tokens" in name])
def test_rows_of_any_size_are_rounded_alike_and_hide_no_nan(name: str, size: int) -> None:
    x = torch.randn(17, size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for own, other in zip(ROUNDED[name](x), ROUNDED[name](x.to(GPU)), strict=True):
        assert torch.equal(own, other.cpu())
    x[3, 7], x[5, 2] = float("nan"), float("inf")
    of_rows = ROUNDED[name](x.to(GPU))
    values = of_rows[1] if len(of_rows) > 1 else of_rows[0]
    assert values.isfinite().all(-1).logical_not().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_rounds_groups_as_a_gpu_does(bits: int, dtype: torch.dtype) -> None:
    weight = 0.02 * torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    weight = weight.to(dtype)
    own, other = (fake_quantize_groups(w, bits, 32) for w in (weight, weight.to(GPU)))
    for one, two in zip(own, other, strict=True):
        assert torch.equal(one, two.cpu())
