"""Parameters that no gradient reaches in transformers are frozen before training."""

import pytest
import torch

from raytrain_adv.model.build import UNREACHED, freeze_unreached
from tests.families import families, tiny_model


def check(kind: str) -> bool:
    """Compare what is frozen with what has no gradient in transformers; whether there is any."""
    model = tiny_model(kind).train()
    if not any(UNREACHED.search(name) for name, _ in model.named_parameters()):
        return False
    freeze_unreached(model)
    frozen = [p for _, p in model.named_parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    model(input_ids=torch.arange(40)[None], use_cache=False).logits.float().logsumexp(
        -1
    ).sum().backward()
    assert frozen and all(p.grad is None for p in frozen), kind
    return True


@pytest.mark.parametrize("kind", ["big_bird", "deepseek_v32", "trocr"])
def test_what_is_frozen_has_no_gradient_in_transformers(kind):
    assert check(kind)


@pytest.mark.slow
def test_in_no_family_anything_is_frozen_that_has_a_gradient():
    assert sum(check(kind) for kind in families()) >= 3
