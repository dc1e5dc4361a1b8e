import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.errors import JobError
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.transforms.loss_kernel import LossKernel
from raytrain_adv.transforms.transform import Context
from tests.families import tiny_model
from tests.tiny_models import job_for


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_the_routers_loss_is_in_the_loss_if_the_config_asks_for_it(kind, tmp_path):
    model = tiny_model(kind)
    ids = torch.arange(24).reshape(2, 12)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    plain = loss_function(model, False)(model, {"input_ids": ids}, labels) / 22
    model.config.output_router_logits = True
    ours = loss_function(model, False)(model, {"input_ids": ids}, labels) / 22
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert ours > plain


def test_a_loss_in_the_head_would_leave_the_routers_out(tmp_path):
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    context = Context(job_for("none", tmp_path), hardware.detect("cpu"))
    auto = LossKernel().plan(model, context)
    assert not auto.changes and "routers" in auto.notes[0]
    with pytest.raises(JobError, match="routers"):
        LossKernel(loss_kernel="chunked").plan(model, context)
