"""A GGUF file of a trained model: blocks of 32 integers with one float16 scale, for llama.cpp."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain_adv.errors import JobError
from raytrain_adv.ops.fake_quant.layers import rounded_weight
from raytrain_adv.ops.fake_quant.rounding import BITS, LEAST_SCALE, integers_of
from raytrain_adv.ops.fake_quant.targets import ARCHITECTURES, Q8_0

FILE = "model.gguf"
BLOCK = 32
PERMUTED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
"""Architecture -> linears whose rows llama.cpp orders for its rotary embedding, and their heads."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In the name of a single expert; llama.cpp has all experts of a layer in one tensor."""
COUNTS = ("num_local_experts", "num_experts")
Array = Any


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint, by its name there."""

    name: str
    value: torch.Tensor
    form: str
    """q8_0 or q4_0; empty for a tensor that is not stored in blocks."""


def write(source: Path, folder: Path, tensors: Iterable[Tensor]) -> None:
    """Write folder/model.gguf; `source` has config.json and the tokenizer. Raises JobError when the
    tokenizer is none that llama.cpp's names are known for.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(str(folder / FILE), architecture)
    _describe(writer, config, source)
    names = _names(config)
    for tensor in _joined(tensors, config):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise JobError(f"llama.cpp has no tensor {tensor.name}", architecture, "report it")
        value = _ordered(tensor.name, tensor.value, config)
        if tensor.form:
            kind = gguf.GGMLQuantizationType[tensor.form.upper()]
            writer.add_tensor(name, _blocks(value, tensor.form), raw_dtype=kind)
        elif value.ndim == 1:
            writer.add_tensor(name, value.float().numpy())
        else:
            kind = gguf.GGMLQuantizationType.BF16
            bits = value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _joined(tensors: Iterable[Tensor], config: dict[str, Any]) -> Iterator[Tensor]:
    """Yield tensors with a layer's experts joined: [rows, columns] of each to [expert, rows,
    columns]. Raises JobError if a layer has not as many as config.json names.
    """
    waiting: dict[str, dict[int, torch.Tensor]] = {}
    for tensor in tensors:
        if (found := EXPERT.search(tensor.name)) is None:
            yield tensor
            continue
        name = EXPERT.sub(".experts.", tensor.name)
        parts = waiting.setdefault(name, {})
        parts[int(found[1])] = tensor.value
        if len(parts) == _num_experts(config):
            del waiting[name]
            yield Tensor(name, torch.stack([parts[n] for n in sorted(parts)]), tensor.form)
    for name, parts in waiting.items():
        what = "Layers of this model have other numbers of experts than config.json"
        found_in = f"{name}: {len(parts)}, {_num_experts(config)} in config.json"
        raise JobError(what, found_in, "correct config.json, or take another qat_target")


def _num_experts(config: dict[str, Any]) -> int:
    """Return the experts of a layer; 0 if the model is no mixture."""
    return next((int(config[key]) for key in COUNTS if config.get(key)), 0)


def _names(config: dict[str, Any]) -> Any:
    """Return gguf's map from names of tensors in the checkpoint to its own."""
    import gguf

    wanted = ARCHITECTURES[config["model_type"]]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    return gguf.get_tensor_name_map(kind, config["num_hidden_layers"])


def _ordered(name: str, value: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Return a tensor with its rows in llama.cpp's order."""
    permuted = PERMUTED.get(ARCHITECTURES[config["model_type"]], {})
    heads = next((config[key] for part, key in permuted.items() if f".{part}." in name), None)
    if heads is None:
        return value
    return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _blocks(weight: torch.Tensor, form: str) -> Array:
    """Return a matrix [..., columns] as rows of bytes: of each block the scale, then integers."""
    rounded = integers_of(weight.flatten(0, -2), BITS[form], BLOCK, LEAST_SCALE[form])
    rows = len(rounded.qdata)
    scale = rounded.scale.float().cpu().numpy().astype(np.float16)[..., None].view(np.uint8)
    integers = rounded.qdata.cpu().numpy().reshape(rows, -1, BLOCK)
    if form == Q8_0:
        body = integers.view(np.uint8)
    else:
        codes = (integers + 8).astype(np.uint8)
        body = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    return np.concatenate([scale, body], -1).reshape(*weight.shape[:-1], -1)


def differences(source: Path, folder: Path, tensors: Iterable[Tensor]) -> Iterator[str]:
    """Yield the tensors whose values in the file are not those that training rounds to.

    Integers and scales are the same; training rounds their products to the weight's dtype.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    names = _names(config)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(folder / FILE)).tensors}
    for tensor in _joined(tensors, config):
        if not tensor.form:
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        found = torch.from_numpy(
            gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).copy()
        )
        wanted, _ = rounded_weight(tensor.value.flatten(0, -2), tensor.form, BLOCK, None)
        wanted = _ordered(tensor.name, wanted.view(tensor.value.shape), config).cpu()
        wrong = int((found.view(wanted.shape).to(wanted.dtype) != wanted).sum())
        if wrong:
            yield f"{tensor.name}: {wrong:,} of {wanted.numel():,} values differ"


def _describe(writer: Any, config: dict[str, Any], source: Path) -> None:
    """Write the model's sizes and its tokenizer."""
    from gguf import TokenType

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if count := _num_experts(config):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        width = config.get("moe_intermediate_size", config["intermediate_size"])
        writer.add_expert_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    file = source / "tokenizer.json"
    tokenizer = json.loads(file.read_text()) if file.is_file() else {}
    pre, model = name_of_tokenizer(tokenizer, config["vocab_size"]), tokenizer["model"]
    tokens = [f"[PAD{n}]" for n in range(config["vocab_size"])]
    kinds = [int(TokenType.UNUSED)] * len(tokens)
    for token, number in model["vocab"].items():
        tokens[number], kinds[number] = token, int(TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        number = config.get(f"{key}_token_id")
        if number is not None:
            add(number[0] if isinstance(number, list) else number)
    writer.add_add_bos_token("SpecialToken" in json.dumps(tokenizer.get("post_processor")))
    template = source / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def name_of_tokenizer(tokenizer: dict[str, Any], vocab_size: int) -> str:
    """Return llama.cpp's name of how a tokenizer, as its tokenizer.json has it, splits text. Raises
    JobError if there is none, or if the model has no embedding of one of its tokens.
    """
    model, pre = tokenizer.get("model", {}), _pre_tokenizer(tokenizer)
    if model.get("type") != "BPE" or not pre:
        raise JobError(
            "llama.cpp's name of this tokenizer is not known",
            model.get("type") or "the model has no tokenizer.json",
            "take another qat_target, as vllm-w4a16: written are tokenizers of Llama 3, Qwen and "
            "SmolLM; or convert output_dir/model by llama.cpp's own converter",
        )
    added = {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    token, largest = max((model["vocab"] | added).items(), key=lambda one: one[1])
    if largest >= vocab_size:
        raise JobError(
            "llama.cpp has no room for a token that the model cannot read",
            f"{token!r} has id {largest:,}, and the model {vocab_size:,} embeddings",
            "set resize_vocab: true, or take another qat_target",
        )
    return pre


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a tokenizer splits text; empty if unknown."""
    text = json.dumps(tokenizer.get("pre_tokenizer") or {})
    if "p{N}{1,3}" in text:
        return "llama-bpe"
    if "Split" in text and "p{N}|" in text:
        return "qwen2"
    if '"Digits"' in text and '"ByteLevel"' in text:
        return "smollm"
    return "gpt-2" if '"ByteLevel", "add_prefix_space"' in text and "Split" not in text else ""
