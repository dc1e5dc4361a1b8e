"""The loss in the head is the model's own; what would pass by an adapter or a cap is refused."""

import copy
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import load
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.hardware import HardwareFacts
from raytrain_adv.model.build import build
from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss.function import cross_entropy_sum, loss_function
from raytrain_adv.ops.loss.head import loss_in_head, loss_of, takes_labels
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms import loss_kernel
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.loss_kernel import LossKernel, read_logit_map
from raytrain_adv.transforms.modules import output_head
from raytrain_adv.trial.compare import relative_error
from raytrain_adv.worker.trials.loss import check_loss
from tests.families import tiny_model
from tests.multimodal_families import tiny_multimodal
from tests.tiny_models import KINDS, SIZES, job_for

PLAIN = Mock(**{"job.train.weighs_tokens": False})
"""Of a job whose loss weighs no tokens."""

MODELS = {
    "llama": {},
    "llama-tied": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.2},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25, "head_dim": 8},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt2": {},
    "mixtral": {},
}
"""gptj's head has a bias; hyperclovax multiplies by the key that granite divides by."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", 16)


def model_of(kind, tmp_path, dtype=torch.float32, **keys):
    """Return a job and a tiny real model with the job's transforms on it."""
    if kind.partition("-")[0] not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    changed = {**SIZES, "vocab_size": 96, **KINDS.get(kind, {}), **MODELS.get(kind, {})}
    config = AutoConfig.for_model(kind.partition("-")[0], **changed)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    job = job_for(tmp_path, tmp_path / "job", train_from_scratch=True, **keys)
    return job, model, Transforms(job).prepare(model)


ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Relative error of a gradient whose sums, of some 100 terms, are added in another order: about the
root of their number. Single entries near zero are further off, by what their large terms round."""


def loss_and_gradients(model, loss_sum):
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (2, 30))
    labels = torch.randint(0, 96, (2, 30))
    labels[:, :7] = -100
    model.eval()
    model.zero_grad()
    loss = loss_sum(model, {"input_ids": ids}, labels)
    (loss * 0.37).backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_all_gradients_are_those_of_plain_logits(kind, tmp_path):
    _, model, _ = model_of(kind, tmp_path, loss_kernel="torch")
    _, ours, plans = model_of(kind, tmp_path)
    assert len(plans["loss_kernel"].changes) == 1
    expected, gradients = loss_and_gradients(model, loss_function(model, False))
    found, of_ours = loss_and_gradients(ours, loss_function(ours, False))
    assert takes_labels(ours) and not takes_labels(model)
    assert found == pytest.approx(expected, rel=1e-6)
    assert of_ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_without_labels_the_model_gives_logits_as_before(tmp_path):
    _, model, _ = model_of("gemma2", tmp_path, loss_kernel="torch")
    _, ours, _ = model_of("gemma2", tmp_path)
    ids = torch.arange(40)[None]
    assert torch.equal(
        model(input_ids=ids, use_cache=False).logits, ours(input_ids=ids, use_cache=False).logits
    )


def test_a_copy_of_the_model_computes_with_its_own_weights(tmp_path):
    _, model, _ = model_of("llama", tmp_path, loss_kernel="chunked")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    inputs, labels = {"input_ids": torch.arange(40)[None]}, torch.arange(40)[None]
    assert loss_in_head(other, inputs, labels).item() == pytest.approx(40 * 4.5643, rel=1e-4)
    assert loss_in_head(model, inputs, labels).item() > 41 * 4.6


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_before_training_reports_what_it_found(kind, dtype, tmp_path):
    job, model, plans = model_of(kind, tmp_path, dtype, loss_kernel="chunked")
    checked = check_loss(job, model, local_run(job, torch.device("cpu")), plans)
    assert "checked before training on 64 random tokens" in checked["loss_kernel"].notes[-1]
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize(
    ("kind", "keys"), [("cohere", "SCALES"), ("granite", "DIVISORS"), ("gemma2", "SOFTCAPS")]
)
def test_what_a_model_does_to_its_logits_by_an_unknown_key_stops_the_run(
    kind, keys, tmp_path, monkeypatch
):
    monkeypatch.setattr(loss_kernel, keys, ())
    job, model, plans = model_of(kind, tmp_path, loss_kernel="chunked")
    with pytest.raises(TrainingError, match="chunked loss differs from the model's own") as error:
        check_loss(job, model, local_run(job, torch.device("cpu")), plans)
    assert "loss: " in error.value.found and "set loss_kernel: torch" in error.value.fix


def test_auto_is_chunked_and_reports_it(tmp_path):
    _, model, plans = model_of("llama", tmp_path)
    assert loss_of(model.lm_head).kernel == "chunked" and loss_of(model.lm_head).reads_weight
    assert plans["loss_kernel"].notes[0].startswith("loss_kernel: auto is chunked: ")


def test_auto_takes_torchs_loss_where_its_own_choice_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_kernel, "SCALES", ())
    job, model, plans = model_of("cohere", tmp_path)
    assert takes_labels(model)
    checked = check_loss(job, model, local_run(job, torch.device("cpu")), plans)["loss_kernel"]
    assert not takes_labels(model) and "forward" not in vars(model.lm_head)
    assert not checked.changes and list(checked.skipped) == ["lm_head"]
    assert (
        "auto is torch after all: The chunked loss differs from the model's own" in checked.notes[0]
    )


def no_compiler(*_):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


def test_auto_takes_torchs_loss_where_triton_cannot_compile(tmp_path, monkeypatch):
    """As on a GPU in an image without gcc, where PyTorch itself runs."""
    monkeypatch.setattr(ops, "softmax_gradient_", no_compiler)
    job, model, plans = model_of("llama", tmp_path)
    checked = check_loss(job, model, local_run(job, torch.device("cpu")), plans)["loss_kernel"]
    assert not takes_labels(model) and not checked.changes
    assert "does not run here: RuntimeError: Failed to find C compiler." in checked.notes[0]
    job, model, plans = model_of("llama", tmp_path, loss_kernel="chunked")
    with pytest.raises(TrainingError, match="chunked loss does not run here") as error:
        check_loss(job, model, local_run(job, torch.device("cpu")), plans)
    assert "C compiler" in error.value.found and "loss_kernel: torch" in error.value.fix


def test_a_model_that_does_more_than_body_and_head_keeps_its_own_forward():
    found = "computes with lm_head.dense.weight after its body"
    model = tiny_model("modernbert-decoder")
    plan = LossKernel().plan(model, PLAIN)
    assert not plan.changes and found in plan.empty_because and plan.notes == (plan.empty_because,)
    with pytest.raises(JobError, match="for models that are a body and a head") as error:
        LossKernel(loss_kernel="chunked").plan(model, PLAIN)
    assert found in error.value.found


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama4_text", "minicpm3", "trocr", "xlm"])
def test_heads_of_several_layers_and_bodies_without_a_name_compute_the_models_loss(kind, tmp_path):
    """BERT's head has a dense layer, Llama 4 names no body, MiniCPM divides before the head."""
    model, chunked = tiny_model(kind).eval(), LossKernel(loss_kernel="chunked")
    ids = torch.arange(48).reshape(2, 24)
    labels = ids.roll(-1, 1)
    expected = cross_entropy_sum(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plan = chunked.plan(model, PLAIN)
    chunked.prepare(model, plan)
    loss = loss_in_head(model, {"input_ids": ids}, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4, msg=name
        )
    job = job_for("none", tmp_path, use_cpu=True)
    found = check_loss(job, model, local_run(job), {"loss_kernel": plan})["loss_kernel"]
    assert found.changes == plan.changes and "checked before training" in found.notes[-1]


class Doubled(torch.nn.Linear):
    """A head that does more than its weight says."""

    def forward(self, input):
        return 2.0 * super().forward(input)


def with_other_head(model):
    head = Doubled(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def test_a_head_that_is_no_plain_linear_is_called_and_not_passed_by(tmp_path):
    job, _, _ = model_of("llama", tmp_path, loss_kernel="chunked")
    _, plain, _ = model_of("llama", tmp_path, loss_kernel="torch")
    ours, plain = with_other_head(copy.deepcopy(plain)), with_other_head(plain)
    plans = Transforms(job).prepare(ours)
    assert plans["loss_kernel"].changes["lm_head"].after.endswith("called chunk by chunk")
    expected, gradients = loss_and_gradients(plain, loss_function(plain, False))
    found, of_ours = loss_and_gradients(ours, loss_function(ours, False))
    assert found == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(of_ours[name], gradient) < ROUNDING, name


@pytest.mark.parametrize("key", [{"loss_kernel": "liger"}, {"cut_cross_entropy": True}])
def test_a_kernel_that_reads_the_weight_is_refused_on_a_head_with_adapters(key, tmp_path):
    _, model, _ = model_of("llama", tmp_path, loss_kernel="torch")
    model.save_pretrained(tmp_path)
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,lm_head"}
    job = job_for(tmp_path, tmp_path / "job", bf16=True, **lora, **key)
    with pytest.raises(JobError) as error:
        Transforms(job).plan(build(job))
    assert next(iter(key)) in error.value.what and "lm_head" in error.value.what
    assert "peft.tuners.lora.layer.Linear" in error.value.found
    assert "loss_kernel: chunked" in error.value.fix


def test_a_head_with_adapters_is_called_and_its_adapters_get_gradients(tmp_path):
    _, model, _ = model_of("llama", tmp_path, loss_kernel="torch")
    model.save_pretrained(tmp_path)
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,lm_head"}
    of_torch, of_ours = (
        job_for(tmp_path, tmp_path / kernel, loss_kernel=kernel, **lora)
        for kernel in ("torch", "chunked")
    )
    found = []
    for job in (of_torch, of_ours):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        Transforms(job).prepare(model)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        found.append(loss_and_gradients(model, loss_function(model, False)))
    (expected, gradients), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    assert sum("lm_head.lora_" in name for name in ours) == 2 and len(ours) == len(gradients)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


CPU = HardwareFacts("cpu", "CPU", None, 2**34, 0, None, "10.0.0.1", 2**34, 2, {})


@pytest.mark.parametrize(("kernel", "package"), sorted(loss_kernel.PACKAGES.items()))
def test_kernels_in_triton_are_refused_without_a_gpu_and_without_their_package(kernel, package):
    transform = LossKernel(loss_kernel=kernel)
    with pytest.raises(ClusterError, match=f"needs {package}"):
        transform.check(CPU)
    there = HardwareFacts(**{**asdict(CPU), "versions": {package: "1.0"}})
    with pytest.raises(ClusterError, match="runs on GPUs only") as error:
        transform.check(there)
    assert "10.0.0.1" in error.value.found and "loss_kernel: chunked" in error.value.fix
    on_gpu = {**asdict(there), "device_type": "cuda", "compute_capability": (9, 0)}
    transform.check(HardwareFacts(**on_gpu))


def test_two_owners_of_the_loss_are_refused_by_name(job_file):
    with pytest.raises(JobError) as error:
        load(job_file(cut_cross_entropy=True, loss_kernel="liger"))
    assert "cut_cross_entropy and loss_kernel" in str(error.value)
    both = load(job_file(cut_cross_entropy=True, loss_kernel="cut_cross_entropy", bf16=True))
    assert [t.name for t in Transforms(both)] == ["loss_kernel"]


def test_cut_cross_entropy_needs_half_precision(job_file):
    with pytest.raises(JobError, match="bf16"):
        load(job_file(cut_cross_entropy=True))
    load(job_file(cut_cross_entropy=True, bf16=True))


def test_torch_is_accepted_by_name_and_owns_nothing(job_file):
    assert list(Transforms(load(job_file(loss_kernel="torch")))) == []


def test_the_head_reports_what_computes_its_loss(tmp_path):
    _, model, _ = model_of("llama", tmp_path, loss_kernel="chunked")
    assert loss_of(model.lm_head).kernel == "chunked"
    assert loss_of(model.model.norm) is None


def test_a_forward_pass_of_the_models_own_is_not_passed_by(tmp_path):
    _, model, _ = model_of("llama", tmp_path, loss_kernel="torch")

    class Own(type(model)):
        pass

    model.__class__ = Own
    with pytest.raises(JobError, match="for models of transformers"):
        LossKernel(loss_kernel="chunked").plan(model, PLAIN)
    plan = LossKernel().plan(model, PLAIN)
    assert not plan.changes and "has its own forward pass" in plan.empty_because


def test_logits_are_scaled_only_if_the_models_own_code_does_it():
    assert read_logit_map(tiny_model("cohere2")).scale == 0.0625
    assert read_logit_map(tiny_multimodal("aya_vision")).scale == 1.0


def test_the_head_of_a_causal_model_inside_makes_the_logits():
    model = tiny_multimodal("nemotron_h_omni")
    assert model.get_output_embeddings() is None  # it does not name it
    assert output_head(model) is model.language_model.lm_head
