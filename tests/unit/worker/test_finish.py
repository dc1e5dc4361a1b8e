"""Sample answers on models with a limited number of positions."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raytrain_adv.worker.finish import greedy_answer


@pytest.mark.parametrize(("prompt", "tokens"), [(20, 12), (60, 4), (64, 0), (80, 0)])
def test_an_answer_ends_where_the_models_positions_do(prompt, tokens):
    """Learned positions: one more was an index error after the last step, before the export."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    model = GPT2LMHeadModel(config)
    answer, cut = greedy_answer(model, [1] * prompt, set(), torch.device("cpu"), 12)
    assert len(answer) == tokens
    assert cut == (
        f"after {tokens} tokens" if tokens else "the prompt fills the model's 64 positions"
    )


def test_an_answer_that_is_cut_states_by_what_and_one_that_ends_does_not():
    """On a CPU, answers without a limit of time took longer than a short training."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    model, cpu = GPT2LMHeadModel(config), torch.device("cpu")
    (first, *_), cut = greedy_answer(model, [1] * 4, set(), cpu, 12)
    assert cut == "after 12 tokens"
    assert greedy_answer(model, [1] * 4, {first}, cpu, 12) == ([], "")
    late = greedy_answer(model, [1] * 4, set(), cpu, 12, deadline=0.0)
    assert late == ([], "answers may take 120 s in all")
    assert model.training
