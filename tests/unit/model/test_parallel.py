"""What torch.compile is held to."""

import pytest
import torch

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model import parallel
from tests.families import tiny_model
from tests.tiny_models import job_for


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
