"""Linears whose weight is read without a call are left as they are: a change would be bypassed."""

from raytrain_adv.transforms.modules import LINEAR, READ, plan_linears
from tests.families import tiny_model


def test_a_linear_whose_weight_kernels_read_is_not_quantized():
    changes, skipped = plan_linears(
        tiny_model("mamba2"), {LINEAR: "other"}, "key", "", lambda one: "", lambda one: ""
    )
    out = {fqn for fqn in skipped if fqn.endswith("out_proj")}
    assert out and {skipped[fqn] for fqn in out} == {READ}
    assert any(fqn.endswith("in_proj") for fqn in changes)
