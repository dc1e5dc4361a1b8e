"""Experts in FP8 on a GPU: torch._scaled_grouped_mm and torchao's casts beside a CPU's results,
and a small Mixtral that trains with them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from raytrain_adv.ops.experts.grouped import GroupedExperts
from raytrain_adv.ops.float8.experts import Float8Experts, distance
from raytrain_adv.ops.float8.grouped import grouped, grouped_outer, wrong_casts
from raytrain_adv.trial.compare import relative_error
from tests.workers import losses, run_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a GPU with FP8 (compute capability 9.0)",
    ),
]
CUDA = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float32]


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_torchaos_casts_gives_the_defined_bits(dtype: torch.dtype) -> None:
    assert wrong_casts(dtype, CUDA) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[128, 256, 384], [16, 32, 384]])
@pytest.mark.parametrize(("width", "out"), [(256, 512), (48, 80)])
def test_products_are_those_of_the_cpu_but_for_the_rounding_of_sums(
    width: int, out: int, ends: list[int], dtype: torch.dtype
) -> None:
    x, pull = numbers(384, width, seed=0, dtype=dtype), numbers(384, out, seed=1, dtype=dtype)
    weight = numbers(3, out, width, seed=2, dtype=dtype)
    offs = torch.tensor(ends, dtype=torch.int32)
    given: list[tuple[Any, tuple[torch.Tensor, torch.Tensor]]] = [
        (grouped, (x, weight.mT)),
        (grouped, (pull, weight)),
        (grouped_outer, (pull, x)),
        (grouped_outer, (x, pull)),
    ]
    for operator, factors in given:
        exact = operator(*factors, offs)
        found = operator(*(t.cuda() for t in factors), offs.cuda()).cpu()
        assert found.shape == exact.shape and found.dtype == exact.dtype
        assert relative_error(found, exact) < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_is_float8s_rounding_off_bf16_with_an_expert_without_a_token(
    compiled: bool,
) -> None:
    torch._dynamo.reset()
    config = MixtralConfig(hidden_size=256, intermediate_size=512, num_local_experts=4)
    plain = MixtralExperts(config).to(CUDA, torch.bfloat16)
    for seed, p in enumerate(plain.parameters()):
        p.data.copy_(0.1 * numbers(*p.shape, seed=seed, dtype=torch.bfloat16))
    chosen = torch.randint(0, 3, (500, 2), generator=torch.Generator().manual_seed(0)).cuda()
    weights = numbers(500, 2, seed=3, dtype=torch.bfloat16).cuda()
    results = []
    for module in (GroupedExperts.of(plain), Float8Experts.of(plain)):
        x = numbers(500, 256, seed=4, dtype=torch.bfloat16).cuda().requires_grad_()
        call: Any = torch.compile(module, fullgraph=True) if compiled else module
        value = call(x, chosen, weights)
        pull = numbers(500, 256, seed=5, dtype=torch.bfloat16).cuda()
        inputs = (x, *module.parameters())
        results.append([value.detach(), *torch.autograd.grad(value, inputs, pull)])
    for exact, found in zip(*results, strict=True):
        assert 0 < relative_error(found, exact) < 0.12
        if found.ndim == 3:
            assert not found[3].any() and found[2].any()


def test_a_trial_at_mixtrals_sizes_is_float8s_rounding() -> None:
    for a, b in ((28672, 4096), (4096, 14336)):
        assert max(distance(a, b, False, CUDA, torch.bfloat16)) < 0.06


def test_a_small_mixtral_trains_as_in_bf16_and_a_profile_shows_the_grouped_products(
    job_file: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    config = Path(keys["model_name_or_path"]) / "config.json"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_local_experts": 4}
    mixture = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **sizes}
    changed = {**json.loads(config.read_text()), **mixture, "attention_dropout": 0.0}
    config.write_text(json.dumps(changed))
    fp8 = {"fp8": True, "fp8_min_features": 16, "fp8_experts": True}
    recomputed = {"disable_gradient_checkpointing": False}
    variants: dict[str, dict[str, Any]] = {
        "bf16": {},
        "fp8": fp8,
        "master weights": {**fp8, "pure_bf16": False, "bf16": True},
        "compiled": {**fp8, "torch_compile": True},
        "compiled, recomputed": {**fp8, "torch_compile": True, **recomputed},
        "compiled, selective": {
            **fp8,
            "torch_compile": True,
            **recomputed,
            "gradient_checkpointing": "selective",
        },
    }
    same = {"pure_bf16": True, "learning_rate": 1e-3, "export_model": False}
    jobs = [
        job_file(f"{n}.yaml", output_dir=str(tmp_path / n), **{**same, **v})
        for n, v in variants.items()
    ]
    figures = dict(zip(variants, run_workers(1, *jobs), strict=True))
    reference = list(losses(tmp_path / "bf16").values())
    for name in list(variants)[1:]:
        found = list(losses(tmp_path / name).values())
        assert found != reference and found == pytest.approx(reference, rel=2e-2), name
        (proof,) = figures[name]["proof"]["fp8"]["others"]
        assert proof["operator"] == "aten::_scaled_grouped_mm", name
        # Of two layers' two matrices: forward, and two gradients; perhaps forward again.
        assert proof["modules"] == 2 and proof["calls"] >= 12, name
        assert proof["gpu_kernels"], name
