import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv import hardware
from raytrain_adv.errors import JobError
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.ops.loss.routers import TOKENS, leave_padding_out
from raytrain_adv.transforms.loss_kernel import LossKernel
from raytrain_adv.transforms.transform import Context
from tests.families import tiny_model
from tests.family_runs import Family, loss_of, read_batch, write_tokenizer
from tests.tiny_models import job_for
from tests.workers import losses, run_workers
from tests.workers import rows as logged


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "jetmoe", "dbrx"])
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


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "deepseek_v4", "jetmoe"])
def test_padding_is_left_out_of_the_routers_loss(kind):
    model = tiny_model(kind)
    model.config.output_router_logits = True
    ids = torch.arange(24).reshape(2, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [5]])).long()
    labels = torch.where(mask == 1, ids, -100)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    assert leave_padding_out(model)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    told = {"input_ids": ids, TOKENS: mask}
    ours = loss_function(model, False)(model, told, shifted) / (shifted != -100).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_a_model_without_a_loss_of_routers_is_told_of_no_padding():
    assert not leave_padding_out(tiny_model("mixtral"))


def with_routers_loss(folder: Path) -> Family:
    """Write a mixture that trains its routers' loss, and rows of three lengths."""
    family = Family("mixtral", folder)
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    model.save_pretrained(family.checkpoint)
    write_tokenizer(family.checkpoint)
    rows = [{"instruction": "Add.", "input": "", "output": "9" * n} for n in (1, 20, 40)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return family


@pytest.mark.parametrize("keys", [{}, {"neat_packing": True, "per_device_train_batch_size": 1}])
def test_the_first_step_has_transformers_loss_with_that_of_the_routers(keys, tmp_path):
    family = with_routers_loss(tmp_path)
    batch = read_batch(family.job("plain"))
    ids, mask, labels = batch
    plain = AutoModelForCausalLM.from_pretrained(family.checkpoint, dtype=torch.float32)
    given = torch.cat([torch.full((len(ids), 1), -100), labels[:, :-1]], 1)
    wanted = plain(input_ids=ids, attention_mask=mask, labels=given, use_cache=False).loss.item()
    assert wanted > loss_of(plain, batch).item() + 0.5
    run_workers(1, family.job("full", **{"per_device_train_batch_size": 3, **keys}))
    assert losses(tmp_path / "full")[1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("accuracy", [False, True])
def test_a_held_out_loss_is_that_of_the_tokens_alone(accuracy, tmp_path):
    """It had the routers' loss in it, in its perplexity too: `evaluate` measured another one."""
    family = with_routers_loss(tmp_path)
    run_workers(1, family.job("full", eval_on_start=True, compute_accuracy=accuracy))
    start = next(row for row in logged(tmp_path / "full") if row["kind"] == "eval")
    plain = AutoModelForCausalLM.from_pretrained(family.checkpoint, dtype=torch.float32)
    wanted = loss_of(plain, read_batch(family.job("plain"))).item()
    assert start["loss"] == pytest.approx(wanted, rel=1e-6)
