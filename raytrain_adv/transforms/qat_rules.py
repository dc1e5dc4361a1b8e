"""What QAT's keys and the rest of a job rule out for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from raytrain_adv.config.problems import Problem
from raytrain_adv.ops.fake_quant.targets import (
    BLOCK,
    FLOAT8,
    FLOAT8_BLOCKS,
    FOUR_BIT_FLOATS,
    GGUF,
)
from raytrain_adv.ops.fake_quant.torchao_config import SERVED

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.transforms.qat import Qat


NO_TABLES = "torchao looks up no rows of float8 tables"


def contradictions(qat: Qat) -> Iterable[Problem]:
    """Yield what QAT's own keys rule out for each other."""
    for key, takes in qat.target.refused(qat.model_dump()):
        fix = f"delete {key}, or qat_target"
        yield Problem(f"{qat.qat_target} {takes}", fix, f"{key} and qat_target")
    if qat.qat_target:
        return
    keys = "qat_weight_dtype"
    if qat.qat_weight_dtype in FOUR_BIT_FLOATS:
        fix = f"set qat_target: vllm-{qat.qat_weight_dtype}a16"
        yield Problem("torchao stores no such weights", fix, keys)
        return
    keys += " and qat_activation_dtype"
    if qat.activation_dtype and qat.is_float8 != (qat.activation_dtype == FLOAT8):
        text = f"no kernel multiplies {qat.qat_weight_dtype} with {qat.activation_dtype}"
        yield Problem(text, f"served are: {SERVED}", keys)
    if not qat.is_float8:
        return
    given, keys = qat.model_fields_set, "qat_weight_dtype and "
    if "qat_group_size" in given and qat.qat_group_size is not None:
        text = "float8 weights have one scale per channel"
        yield Problem(text, "delete qat_group_size, or set it to null", keys + "qat_group_size")
    if "qat_quantize_embedding" in given and qat.qat_quantize_embedding:
        fix = "set qat_quantize_embedding: false, or take integer weights"
        yield Problem(NO_TABLES, fix, keys + "qat_quantize_embedding")


def conflicts(qat: Qat, job: JobConfig) -> Iterable[Problem]:
    """Yield what cannot be rounded, merged or computed."""
    yield from _with_fp8(job)
    if qat.merges:
        yield from _merging(job)
    if qat.target.layout == GGUF and not job.train.computes_in_bf16:
        text = "llama.cpp's float16 holds no float32 scales exactly"
        yield Problem(text, "set bf16: true", "qat_target and bf16")
    if qat.target.weight_form in FOUR_BIT_FLOATS and not job.train.computes_in_bf16:
        text = "the written weights are read as bfloat16, and not multiplied with float32"
        yield Problem(text, "set bf16: true", "qat_target and bf16")
    adapts = job.flat()["finetuning_type"] == "lora"
    if qat.target.layout == GGUF and adapts and not qat.merges:
        fix, keys = "set qat_lora: merge_aware", "qat_target and finetuning_type"
        yield Problem("a GGUF file holds no adapter", fix, keys)
    if qat.activation_dtype == FLOAT8:
        key, none = "qat_activation_dtype", "or set qat_activation_dtype: none"
        if job.parallel.use_cpu:
            text = "float8 products need a GPU of compute capability 8.9 or newer"
            yield Problem(text, f"set use_cpu: false, {none}", f"{key} and use_cpu")
        if not job.train.computes_in_bf16:
            text = "products of float8 rows come out in bfloat16 alone"
            default = "" if "bf16" in job.train.model_fields_set else ", whose default is false"
            yield Problem(text + default, f"set bf16: true, {none}", f"{key} and bf16")


def _merging(job: JobConfig) -> Iterable[Problem]:
    """Refuse what one merged weight cannot hold."""
    keys = job.flat()
    if keys["finetuning_type"] != "lora":
        fix = "delete qat_lora, or set finetuning_type: lora"
        yield Problem("there is no adapter to merge", fix, "qat_lora and finetuning_type")
        return
    if keys["lora_dropout"]:
        text = "a merged weight has no dropout on its adapter's input"
        yield Problem(text, "set lora_dropout: 0", "qat_lora and lora_dropout")
    if keys["fp8"]:
        text = "the sum of base and adapter is not multiplied in FP8"
        yield Problem(text, "set fp8: false, or qat_lora: separate", "qat_lora and fp8")


def _with_fp8(job: JobConfig) -> Iterable[Problem]:
    fp8 = {k: v for t in job.transforms if t.enabled for k, v in t.model_dump().items()}
    if not fp8.get("fp8"):
        return
    key, off = "fp8_enable_fsdp_float8_all_gather", "or enable_qat: false"
    if fp8[key]:
        text = "QAT would round weights that were gathered in float8, and export others"
        yield Problem(text, f"set {key}: false, {off}", f"{key} and enable_qat")
    if fp8["fp8_recipe"] != "tensorwise":
        text = f"rounded weights are multiplied in FP8 with one scale, not {fp8['fp8_recipe']}"
        yield Problem(text, f"set fp8_recipe: tensorwise, {off}", "fp8_recipe and enable_qat")
    if fp8["fp8_experts"] is True:
        text = "experts' rounded values are multiplied in bf16"
        yield Problem(text, f"set fp8_experts: auto, {off}", "fp8_experts and enable_qat")


def reasons_against(
    qat: Qat,
) -> tuple[Callable[[nn.Linear], str], Callable[[nn.Module], str]]:
    """Return what returns why a linear, and stacked experts, are not rounded; empty if they are."""
    in_blocks = qat.weight_form == FLOAT8_BLOCKS
    needs = BLOCK if in_blocks else 16
    odd = f"sizes not divisible by {needs}, which float8 products need"

    def against_linear(linear: nn.Linear) -> str:
        if "own_class" in vars(linear):
            return "transformers multiplies with its weight, which is then no plain tensor"
        is_odd = linear.in_features % needs or linear.out_features % needs
        return odd if is_odd and (qat.activation_dtype == FLOAT8 or in_blocks) else ""

    def against_experts(experts: nn.Module) -> str:
        from raytrain_adv.ops.experts.find import known_layout, widths_of

        widths = widths_of(experts)
        if in_blocks and any(width % BLOCK for width in widths.values()):
            return odd
        if qat.qat_target == "vllm-w4a16" and widths[known_layout(experts).up] % BLOCK:
            return f"a hidden size not divisible by {BLOCK}, which Marlin's experts need"
        return ""

    return against_linear, against_experts
