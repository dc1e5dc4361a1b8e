"""A merged mixture is compared with its trained model's choice of experts, and each part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raytrain_adv import hardware
from raytrain_adv.config import JobConfig
from raytrain_adv.errors import TrainingError
from raytrain_adv.export.merge import Merged, export_merged
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.export.routing import Routing
from raytrain_adv.export.verify import load_folder
from raytrain_adv.model.build import build
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.ops.experts.find import expert_modules, matrices
from raytrain_adv.transforms.applied import Transforms
from tests.families import randomize, tiny_config
from tests.tiny_models import job_for

CPU = torch.device("cpu")
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "phimoe", "dbrx"]
MIXTURES += ["olmoe", "ernie4_5_moe", "lfm2_moe"]
Adapted = tuple[PreTrainedModel, JobConfig]


class NoTokenizer:
    """Stands for a tokenizer, of which nothing is compared."""

    eos_token_id = None

    def save_pretrained(self, folder: str) -> None:
        """Write nothing."""


def adapted(kind: str, folder: Path, **changed: Any) -> Adapted:
    """Return a tiny mixture in bf16 whose adapters change what it computes."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    randomize(auto.from_config(tiny_config(kind), dtype=torch.bfloat16)).save_pretrained(
        folder / "m"
    )
    keys: dict[str, Any] = {
        "finetuning_type": "lora",
        "lora_rank": 4,
        "bf16": True,
        "use_cpu": True,
    }
    keys |= changed
    job = job_for(folder / "m", folder, **keys)
    model = build(job)
    plans = Transforms(job).prepare(model, hardware.detect(CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    Transforms(job).initialize(model, plans, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, job


IDS = torch.randint(264, (256,), generator=torch.Generator().manual_seed(1))
TOKENIZER: Any = NoTokenizer()


def merged(one: Adapted, out: Path) -> Merged:
    return export_merged(*one, out, TOKENIZER, IDS, "make room")


@pytest.mark.parametrize("kind", MIXTURES)
def test_rounding_that_sends_tokens_through_other_experts_is_no_defect(
    kind: str, tmp_path: Path
) -> None:
    found = merged(adapted(kind, tmp_path), tmp_path / "out")
    assert 0 < found.num_rerouted < 0.1 * found.num_tokens
    assert found.difference < 0.03 * found.largest


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted(request.param, tmp_path_factory.mktemp(request.param))


def _last_stack(model: nn.Module) -> torch.Tensor:
    *_, last = expert_modules(model)
    *_, matrix = matrices(model.get_submodule(last)).values()
    return matrix.data


def _router(model: nn.Module) -> torch.Tensor:
    named = [(n.split("."), p) for n, p in model.named_parameters() if p.shape == (4, 64)]
    return next(p.data for n, p in reversed(named) if n[-2] in ("gate", "router"))


def swap_experts(model: nn.Module) -> None:
    _last_stack(model)[[0, 1]] = _last_stack(model)[[1, 0]]


def scale_expert(model: nn.Module) -> None:
    _last_stack(model)[2] *= 1.2


def swap_rows(model: nn.Module) -> None:
    _router(model)[[0, 1]] = _router(model)[[1, 0]]


def clear_row(model: nn.Module) -> None:
    _router(model)[3] = 0


def forget_bias(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer += torch.tensor([0.1, -0.2, 0.3, 0.0])


@pytest.mark.parametrize("fault", [swap_experts, scale_expert, swap_rows, clear_row])
def test_one_wrong_expert_or_row_of_a_router_is_refused(
    fault: Callable[[nn.Module], None],
    mixture: Adapted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _refused(fault, mixture, tmp_path, monkeypatch)


def test_a_bias_that_only_chooses_experts_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapted("deepseek_v3", tmp_path)
    _refused(forget_bias, one, tmp_path, monkeypatch)


def _refused(
    fault: Callable[[nn.Module], None],
    one: Adapted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*given: Any) -> Any:
        model = load_folder(*given)
        fault(model)
        return model

    monkeypatch.setattr("raytrain_adv.export.merge.load_folder", wrong)
    with pytest.raises(TrainingError, match="off, given the same"):
        merged(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_without_their_adapter_are_refused(
    mixture: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain_adv.export.merge.merged_stacks", lambda _: {})
    with pytest.raises(TrainingError, match=r"experts is .* off, given the same"):
        merged(mixture, tmp_path / "out")


@pytest.mark.parametrize("bits_must_agree", [True, False])
def test_a_quantized_mixture_whose_bits_need_not_agree_is_compared_as_it_was_routed(
    bits_must_agree: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8, and another device than training's, round at other places than the plain folder."""

    def rounded(*given: Any) -> Any:
        model = load_folder(*given)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.manual_seed(0)
                parameter.data *= 1 + 0.01 * torch.randn_like(parameter)
        return model

    one = adapted("mixtral", tmp_path, enable_qat=True, qat_weight_dtype="int4", qat_group_size=8)
    monkeypatch.setattr("raytrain_adv.export.verify.load_folder", rounded)
    if bits_must_agree:
        with pytest.raises(TrainingError, match="bit for bit"):
            export_model(*one, tmp_path / "out", TOKENIZER, IDS)
        return
    monkeypatch.setattr("raytrain_adv.export.verify.why_not_exact", lambda *_: "FP8 rounds")
    found = export_model(*one, tmp_path / "out", TOKENIZER, IDS).converted
    assert "as routed in training, from which rounding moves" in found["quantized_comparison"]


def test_recording_a_pass_changes_nothing_and_leaves_nothing(mixture: Adapted) -> None:
    model, ids = mixture[0].train(False), torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with Routing(model) as known:
            recorded = model(input_ids=ids, use_cache=False).logits
        with Routing(model, known) as again:
            held = model(input_ids=ids, use_cache=False).logits
    assert known.routers and known.experts and again.form() == known.form()
    assert torch.equal(plain, recorded) and torch.equal(plain, held)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_heads_bias_is_kept_where_the_table_that_it_is_tied_with_is_quantized(
    tmp_path: Path,
) -> None:
    """BERT's was zero in the quantized folder: config.json unties it from the one in the files."""
    keys = {"enable_qat": True, "qat_weight_dtype": "int4", "qat_group_size": 8}
    one = adapted("bert", tmp_path, **keys, qat_quantize_embedding=True)
    found = export_model(*one, tmp_path / "out", TOKENIZER, IDS[:100])
    assert found.converted["quantized_logit_difference"] == 0
