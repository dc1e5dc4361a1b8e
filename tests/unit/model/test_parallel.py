"""What torch.compile is held to."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.families import tiny_model
from tests.tiny_models import job_for, write_checkpoint


def test_a_layer_that_would_be_left_eager_is_an_error(monkeypatch):
    """torch.compile warns once, and runs it eager from then on: with FP8, too, without a word."""
    monkeypatch.setattr(parallel, "MOST_GRAPHS", 3)
    add = torch.compile(lambda x, how: x + len(how), backend="eager")
    config = torch._dynamo.config
    with config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        parallel.require_compiled()
        for how in ("a", "bb", "ccc"):
            add(torch.ones(2), how)
        with pytest.raises(TrainingError, match="would leave a layer eager") as refused:
            parallel.refuse_eager(add)(torch.ones(2), "dddd")
    assert refused.value.found and "torch_compile: false" in refused.value.fix


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("flash_attn._flash_attn_varlen_forward.default", True),
        ("flash_attn_3.fwd.default", True),
        ("flash_attn._flash_attn_backward.default", False),
        ("aten.mul.Tensor", False),
    ],
)
def test_selective_checkpointing_keeps_a_packages_attention(name, kept):
    assert parallel._is_flash_attention(name) is kept


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_selective_checkpointing_of_experts_changes_no_gradient(kind):
    model = tiny_model(kind)
    model.set_experts_implementation("grouped_mm")
    tokens = torch.arange(32).reshape(2, 16)

    def gradients():
        model.zero_grad()
        model(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    for fqn, layer in parallel.decoder_layers(model):
        model.set_submodule(fqn, parallel._checkpointed(layer, "selective"))
    assert all(map(torch.equal, gradients(), expected))


def test_layers_that_share_weights_are_refused_by_name(tmp_path):
    job = job_for("none", tmp_path, use_cpu=True)
    with pytest.raises(JobError, match="share weights") as refused:
        parallel.shard(tiny_model("zamba"), job, None)
    assert "shared_transf" in refused.value.found
    parallel.shard(tiny_model("llama"), job, None)


def test_a_compiled_layer_that_assigns_every_third_element_is_refused_before_triton_3_8():
    """pytorch#193183: on a GPU 98,229 of 524,288 elements were wrong, without a word."""
    model = tiny_model("llama")
    model.model.layers[1].own = EveryThird()
    with pytest.raises(TrainingError, match="every third element") as refused:
        parallel.refuse_wrong_slices(model, "3.7.1")
    assert "model.layers.1.own (EveryThird), Triton 3.7.1" in refused.value.found
    assert "torch_compile: false" in refused.value.fix
    parallel.refuse_wrong_slices(model, "3.8.0")
    parallel.refuse_wrong_slices(model, None)


class EveryThird(torch.nn.Module):
    """What interleaved M-RoPE does."""

    def forward(self, x):
        y = x[0].clone()
        y[..., 1:6:3] = x[1, ..., 1:6:3]
        return y


def test_no_layer_of_transformers_assigns_every_third_element():
    """Rotary tables do, which the model computes outside of its layers; nothing else may."""
    found = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text()
        if parallel.EVERY_THIRD.search(text):
            lines = text.split("\n")  # ast.get_source_segment splits the text for each part
            places = [(node.lineno - 1, node.end_lineno) for node in ast.parse(text).body]
            parts = ["\n".join(lines[start:end]) for start, end in places]
            found[file.parent.name] = [p for p in parts if parallel.EVERY_THIRD.search(p)]
    heads = {kind: [part.splitlines()[0] for part in parts] for kind, parts in found.items()}
    assert {"qwen3_5", "qwen3_vl", "qwen3_vl_moe"} <= heads.keys()
    vision = {"sapiens2", "vitpose"}  # poses of people in images: no language models
    for kind in heads.keys() - vision:
        (head,) = heads[kind]
        assert "RotaryEmbedding(nn.Module)" in head, (kind, head)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_families_with_interleaved_rotary_tables_are_compiled_without_them(kind):
    model = tiny_model(kind)
    assert any("RotaryEmbedding" in type(module).__name__ for module in model.modules())
    parallel.refuse_wrong_slices(model, "3.7.1")


def test_a_float32_module_whose_weight_is_read_is_not_sharded_apart(tmp_path):
    """It is never called, so that nothing would gather it."""
    model, apart = tiny_model("bailing_hybrid"), []
    job = job_for("none", tmp_path, use_cpu=True, bf16=True)
    parallel._shard_float32(model, job, lambda module, mp_policy: apart.append(module))
    assert not any(isinstance(module, torch.nn.Conv1d) for module in apart)


@pytest.mark.parametrize(
    ("kind", "keys", "apart"),
    [
        ("llama", {}, True),
        ("llama-tied", {}, False),
        ("llama", {"fsdp_cpu_offload": True}, False),
        ("llama", {"enable_qat": True, "qat_quantize_embedding": True, "qat_group_size": 8}, False),
    ],
)
def test_embedding_and_head_are_units_where_they_are_plain(
    kind: str, keys: dict[str, Any], apart: bool, tmp_path: Path
) -> None:
    job = job_for(write_checkpoint(kind, tmp_path / "model"), tmp_path, **keys)
    model = build(job)
    Transforms(job).prepare(model)
    found = parallel.ends(model, job)
    assert found == ((model.get_input_embeddings(), model.get_output_embeddings()) if apart else ())
