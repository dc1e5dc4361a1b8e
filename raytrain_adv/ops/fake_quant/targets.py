"""What a quantized model is for: an engine's scheme, the QAT keys it takes, and how it rounds."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytrain_adv.errors import JobError

COMPRESSED, GGUF, TORCHAO = "compressed-tensors", "gguf", "torchao"
"""Layouts of the exported model."""
FLOAT8 = "float8_e4m3fn"
NVFP4, MXFP4 = "nvfp4", "mxfp4"
FOUR_BIT_FLOATS = {NVFP4: 16, MXFP4: 32}
"""Weights in four-bit floats -> input features that share a scale."""
IN_FLOAT32 = "float32"
"""Suffix of dtypes that are rounded in float32, as engines do, not in the tensor's own dtype."""
INT8_OF_EXPERTS = "int8 of experts"
"""Symmetric activations, where those of linears are not."""
INT8_IN_FLOAT32, FLOAT8_IN_FLOAT32 = f"int8 {IN_FLOAT32}", f"{FLOAT8} {IN_FLOAT32}"
FLOAT8_BLOCKS, FLOAT8_GROUPS = f"{FLOAT8} blocks", f"{FLOAT8} groups"
"""One scale per BLOCK x BLOCK weights, and per BLOCK features of a token."""
FLOAT8_ROWS = f"{FLOAT8} rows"
"""FLOAT8 whose bias is added before the product is rounded; torchao adds it after."""
BLOCK = 128
INTEGERS = "int-quantized"
"""compressed-tensors' only format whose weights PEFT 0.21 takes next to an adapter: it takes no
packed ones, and rounds an adapter next to float8 to that. Remove when it does neither."""
UNPACKING = "quantization_config=CompressedTensorsConfig(dequantize=True)"
"""How transformers loads the others next to an adapter: it unpacks them, and leaves activations as
they are."""
Q8_0, Q4_0 = "q8_0", "q4_0"
ROUNDED_BY = {
    FLOAT8: "quantize_float8",
    FLOAT8_ROWS: "quantize_float8",
    FLOAT8_BLOCKS: "quantize_float8_blocks",
    INT8_IN_FLOAT32: "quantize_rows",
    **dict.fromkeys(FOUR_BIT_FLOATS, "quantize_float4"),
}
"""Form of weights -> the operator that rounds them, if it is not fake_quantize_groups."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM and SGLang multiply as one."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES |= {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""model_type of transformers -> llama.cpp's architecture, of those that are written."""
TAKEN = {"qwen3_moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}}
"""What llama.cpp has no key for, and takes as given."""


@dataclass(frozen=True)
class Target:
    """An engine's scheme. The first of a key's values is the one that the target sets."""

    engine: str
    layout: str
    weight_dtype: str
    activation_dtypes: tuple[str, ...] = ("none",)
    group_sizes: tuple[int | None, ...] = (None,)
    weight_form: str = ""
    """How weights are rounded, if otherwise than torchao rounds their dtype."""
    activation_forms: Mapping[str, str] = field(default_factory=dict)
    """The same of activations."""
    of_experts: Mapping[str, str] = field(default_factory=dict)
    """The same of experts' activations, if otherwise."""
    served: str = ""
    """How the engine multiplies this form, in a sentence without its subject."""
    rounds_itself: str = ""
    """What the engine rounds otherwise than training does; empty for nothing."""
    no_experts: Mapping[str, str] = field(default_factory=dict)
    """qat_activation_dtype, empty for none -> why experts are not rounded with it."""

    def keys(self) -> dict[str, tuple[Any, ...]]:
        """Return which values each key of QAT can take."""
        if not self.weight_dtype:
            return {}
        return {
            "qat_weight_dtype": (self.weight_dtype,),
            "qat_activation_dtype": self.activation_dtypes,
            "qat_group_size": self.group_sizes,
            "qat_quantize_embedding": (False,),
        }

    def refused(self, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the keys whose values the engine does not take, each with what it takes."""
        for key, allowed in self.keys().items():
            if values[key] not in allowed and (values[key] or "none") not in allowed:
                takes = " or ".join("null" if one is None else str(one) for one in allowed)
                yield key, f"takes {key}: {takes.lower()}"


FLOAT8_ALONE = "vLLM 0.32 has no products of experts in float8 with inputs that are not rounded"
SUMS = "activations are rounded from sums that each engine adds in its own order"
WeightDtype = Literal["int8", "int4", "int3", "int2", "float8_e4m3fn", "nvfp4", "mxfp4"]
TargetName = Literal[
    "vllm-w4a16",
    "vllm-w8a8-int8",
    "vllm-fp8",
    "vllm-fp8-block",
    "vllm-nvfp4a16",
    "vllm-mxfp4a16",
    "executorch-8da4w",
    "llamacpp-q8_0",
    "llamacpp-q4_0",
]
NO_TARGET = Target("", TORCHAO, "")
TARGETS: dict[str, Target] = {
    "vllm-w4a16": Target(
        "vLLM",
        COMPRESSED,
        "int4",
        group_sizes=(32, 64, 128, None),
        served="by Marlin on GPUs (by Machete on Hopper in groups of 64, 128 or per channel)",
    ),
    "vllm-w8a8-int8": Target(
        "vLLM",
        COMPRESSED,
        "int8",
        ("int8",),
        weight_form=INT8_IN_FLOAT32,
        activation_forms={"int8": INT8_IN_FLOAT32},
        served="in int8 by CUTLASS on GPUs, by oneDNN on CPUs",
        rounds_itself=SUMS,
        of_experts={"int8": INT8_OF_EXPERTS},
    ),
    "vllm-fp8": Target(
        "vLLM",
        COMPRESSED,
        FLOAT8,
        (FLOAT8, "none"),
        weight_form=FLOAT8_ROWS,
        activation_forms={FLOAT8: FLOAT8_IN_FLOAT32},
        no_experts={"": FLOAT8_ALONE},
        served="in float8 on compute capability 8.9 and newer; weights alone by Marlin",
        rounds_itself=SUMS,
    ),
    "vllm-fp8-block": Target(
        "vLLM",
        COMPRESSED,
        FLOAT8,
        (FLOAT8, "none"),
        weight_form=FLOAT8_BLOCKS,
        activation_forms={FLOAT8: FLOAT8_GROUPS},
        no_experts={"": FLOAT8_ALONE},
        served="in float8 on compute capability 8.9 and newer; weights alone by Marlin",
        rounds_itself=f"it adds products of blocks in float32, training rounds factors; {SUMS}",
    ),
    "vllm-nvfp4a16": Target(
        "vLLM",
        COMPRESSED,
        NVFP4,
        group_sizes=(16,),
        weight_form=NVFP4,
        served="by Marlin on GPUs older than Blackwell too",
    ),
    "vllm-mxfp4a16": Target(
        "vLLM",
        COMPRESSED,
        MXFP4,
        group_sizes=(32,),
        weight_form=MXFP4,
        served="by Marlin on GPUs older than Blackwell too",
    ),
    "executorch-8da4w": Target(
        "ExecuTorch",
        TORCHAO,
        "int4",
        ("int8",),
        group_sizes=(32, 64, 128, 256),
        served="by XNNPACK on CPUs, in int8 x int4",
        rounds_itself=f"it computes in float32, a bf16 job in bfloat16; {SUMS}",
        no_experts={"int8": "XNNPACK has no products of integers for a token's own experts"},
    ),
    "llamacpp-q8_0": Target(
        "llama.cpp",
        GGUF,
        "int8",
        group_sizes=(32,),
        weight_form=Q8_0,
        served="in int8 on CPUs and GPUs",
        rounds_itself="it rounds activations to int8 in blocks of 32, which training does not",
    ),
    "llamacpp-q4_0": Target(
        "llama.cpp",
        GGUF,
        "int4",
        group_sizes=(32,),
        weight_form=Q4_0,
        served="in int8 x int4 on CPUs and GPUs",
        rounds_itself="it rounds activations to int8 in blocks of 32, which training does not",
    ),
}


def nearest_target(weight_dtype: str, group_size: int | None, activation_dtype: str) -> str:
    """Return the target that is nearest to keys without one; `activation_dtype` may be empty."""
    activation = activation_dtype or "none"
    fitting = [
        name
        for name, target in TARGETS.items()
        if weight_dtype == target.weight_dtype and activation in target.activation_dtypes
    ]
    exact = [name for name in fitting if group_size in TARGETS[name].group_sizes]
    coarse = "vllm-w4a16" if weight_dtype in ("int4", "int3", "int2") else "vllm-w8a8-int8"
    return next(iter([*exact, *fitting, coarse]))


def served(name: str | None, weight_dtype: str, group_size: int | None, activation: str) -> str:
    """Return in a sentence which engines multiply a form fast, which only load it, and without a
    target the nearest one that is fast. `activation` is empty for none.
    """
    if target := TARGETS.get(str(name)):
        otherwise = f"; {target.rounds_itself}" if target.rounds_itself else ""
        return f"{target.engine} multiplies it {target.served}{otherwise}"
    near = nearest_target(weight_dtype, group_size, activation)
    fast = {
        ("int4", "int8"): "ExecuTorch multiplies this form fast",
        (FLOAT8, FLOAT8): "vLLM multiplies this form fast on GPUs",
    }.get((weight_dtype, activation), "no engine multiplies this form fast")
    return (
        f"served as torchao's tensors: {fast}; transformers and vLLM load it and multiply it "
        f"dequantized, slower than bf16; nearest that is fast: qat_target: {near}"
    )


def in_words(name: str | None, weight_dtype: str, group_size: int | None, activation: str) -> str:
    """Return a form in words, as `int4 weights in groups of 32, int8 activations`."""
    groups = f"in groups of {group_size}" if group_size else "per channel"
    activations = f"{activation} activations" if activation else ""
    target = f"for {name}" if name else ""
    return ", ".join(filter(None, (f"{weight_dtype} weights {groups}", activations, target)))


def refuse_for_layout(
    target: Target,
    config: Any,
    changes: Mapping[str, object],
    skipped: Mapping[str, str],
    stacks: list[str],
    why_no_experts: str,
) -> None:
    """Refuse what a target's layout cannot hold, or its engine not multiply.

    Args:
        target: what the model is exported for.
        config: the model's.
        changes: names of the linears and experts that are rounded.
        skipped: names of the others -> why.
        stacks: the experts among `changes`.
        why_no_experts: why no engine takes them one by one; empty if they are stored so.

    Raises:
        JobError: naming the modules.
    """
    if stacks and target.engine and why_no_experts:
        raise JobError(
            "qat_target does not round this model's experts",
            f"{stacks[0]} and {len(stacks) - 1} more: {why_no_experts}",
            "leave them out: qat_exclude: experts; or set no qat_target, which exports them as "
            "torchao's tensors",
        )
    if target.layout == TORCHAO:
        return
    if target.layout == GGUF:
        for found in _not_of_llamacpp(config):
            raise JobError(
                "qat_target llamacpp does not write this model",
                found,
                "take another qat_target, or convert output_dir/model by llama.cpp's own converter",
            )
        return
    for fqn, reason in skipped.items():
        parent, _, name = fqn.rpartition(".")
        others = next((names for names in FUSED if name in names), ())
        if rounded := [one for one in others if f"{parent}.{one}" in changes]:
            raise JobError(
                f"{fqn} is left out, and {rounded[0]} beside it is rounded",
                f"{reason}; engines multiply {', '.join(others)} as one linear",
                "leave out all of them by qat_exclude, or none",
            )


def _not_of_llamacpp(config: Any) -> Iterator[str]:
    """Yield what llama.cpp would compute otherwise."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ARCHITECTURES or kind != "default":
        known = f"{', '.join(ARCHITECTURES)} with the plain one"
        yield f"{config.model_type} with {kind} rotary embedding; written are {known}"
    for key, value in TAKEN.get(config.model_type, {}).items():
        if (found := getattr(config, key)) != value:
            yield f"{key} {found}; llama.cpp computes {config.model_type} with {value}"


def stored_as(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return how a model folder's config.json says that it is rounded, as (compressed-tensors,
    pack-quantized) or (torchao, ""); two empty texts if it is not.
    """
    stored = config.get("quantization_config") or {}
    return str(stored.get("quant_method") or ""), str(stored.get("format") or "")


def unpacking(folder: Path) -> dict[str, Any]:
    """Return the key of config.json by which transformers unpacks a folder's weights as it loads
    them, where it has to: see UNPACKING. Empty where it has not.
    """
    key, config = "quantization_config", json.loads((folder / "config.json").read_text())
    method, form = stored_as(config)
    has_adapter = (folder / "adapter_config.json").is_file()
    if method != COMPRESSED or form == INTEGERS or not has_adapter:
        return {}
    return {key: {**config[key], "dequantize": True}}
