"""Names that are stored so that transformers and PEFT read them as the model's."""

import pytest

from raytrain_adv.errors import JobError
from raytrain_adv.model.adapter import peft_names
from raytrain_adv.transforms.modules import names_to_store
from tests.families import tiny_model

SHARED = "model.layers.1.mlp.shared_experts.gate_proj.weight"


def test_a_name_that_the_mapping_would_change_again_is_stored_as_in_checkpoints():
    name_to_store = names_to_store(tiny_model("laguna"))
    assert name_to_store(SHARED) == SHARED.replace("shared_experts", "shared_expert")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3"])
def test_other_names_are_stored_as_the_models(kind):
    model = tiny_model(kind)
    assert all(map(str.__eq__, map(names_to_store(model), model.state_dict()), model.state_dict()))


def test_modules_that_are_trained_in_full_keep_their_names_which_peft_does_not_change():
    assert peft_names(tiny_model("laguna"))(SHARED).endswith(SHARED)


def test_an_adapter_that_peft_would_not_find_is_refused():
    name = "model.layers.1.self_attn.k_sconv.weight_proj.lora_A.default.weight"
    with pytest.raises(JobError, match="PEFT would not find the adapter"):
        peft_names(tiny_model("inkling2_text"))(name)
