"""A model that sees the tokens it would be trained to predict is refused."""

import pytest
import torch

from raytrain_adv.errors import TrainingError
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.trials.causal import check_causal
from tests.families import tiny_model
from tests.tiny_models import job_for


@pytest.mark.parametrize("kind", ["llama", "mamba2", "gpt_neox"])
def test_a_causal_model_passes(kind, tmp_path):
    job = job_for("none", tmp_path, use_cpu=True)
    check_causal(job, tiny_model(kind), local_run(job))


def test_an_encoder_is_refused_with_the_key_that_makes_it_causal(tmp_path):
    job = job_for("none", tmp_path, use_cpu=True)
    with pytest.raises(TrainingError, match="sees the tokens") as refused:
        check_causal(job, tiny_model("bert", is_decoder=False), local_run(job))
    assert "is_decoder: true" in refused.value.fix


def test_an_encoder_is_refused_in_bfloat16_too(tmp_path):
    job = job_for("none", tmp_path, use_cpu=True, bf16=True)
    model = tiny_model("bert-generation", torch.bfloat16, is_decoder=False)
    with pytest.raises(TrainingError, match="sees the tokens"):
        check_causal(job, model, local_run(job))


def test_a_model_whose_own_code_fails_is_an_error_that_says_so(tmp_path):
    """xLSTM in bfloat16 multiplies two dtypes, in transformers alone too."""
    job = job_for("none", tmp_path, use_cpu=True, bf16=True)
    with pytest.raises(TrainingError, match="forward pass of xLSTMForCausalLM fails in bfloat16"):
        check_causal(job, tiny_model("xlstm", torch.bfloat16), local_run(job))
