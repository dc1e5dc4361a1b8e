"""Tensors have the dtype that they have in transformers, whatever the job computes in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv.model.build import build, keeps_float32
from tests.families import tiny_model
from tests.tiny_models import job_for

JOBS = {
    "bf16": ({"bf16": True}, torch.float32),
    "pure_bf16": ({"pure_bf16": True}, torch.bfloat16),
    "lora": ({"bf16": True, "finetuning_type": "lora"}, torch.bfloat16),
}


@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe", "minimax", "falcon_h1", "llama"])
@pytest.mark.parametrize("name", JOBS)
def test_kept_tensors_and_buffers_are_as_in_transformers(kind, name, tmp_path):
    keys, dtype = JOBS[name]
    tiny_model(kind).save_pretrained(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    ours = build(job_for(tmp_path / "model", tmp_path, use_cpu=True, **keys))
    keeps = keeps_float32(ours)
    for fqn, parameter in theirs.named_parameters():
        expected = torch.float32 if keeps(fqn) else dtype
        assert ours.get_parameter(fqn).dtype == expected, fqn
        assert (parameter.dtype == torch.float32) == keeps(fqn), fqn
    for fqn, buffer in theirs.named_buffers():
        assert ours.get_buffer(fqn).dtype == buffer.dtype, fqn
