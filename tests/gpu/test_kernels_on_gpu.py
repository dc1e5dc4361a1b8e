"""Kernels on a GPU: the worked example against torch, and whole runs with FP8 and adapters on."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from raytrain_adv import hardware
from raytrain_adv.errors import JobError
from raytrain_adv.kernels.fetch import Place, find
from raytrain_adv.kernels.source import read
from raytrain_adv.kernels.swap import LayerSource, load_layer
from raytrain_adv.kernels.variants import Target
from raytrain_adv.trial.module import Candidate, try_module
from tests.kernel_folders import ACTIVATION, write_kernel
from tests.workers import losses, run_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
EXAMPLE = Path(__file__).parents[2] / "jobs" / "kernels" / "llama_layers"
FP8 = {"fp8": True, "fp8_min_features": 16}
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


class Norm(nn.Module):
    """Llama's norm."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states):
        values = hidden_states.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * values.to(hidden_states.dtype)


class Mlp(nn.Module):
    """Llama's MLP."""

    def __init__(self, features):
        super().__init__()
        self.gate_proj = nn.Linear(features, 3 * features, bias=False)
        self.up_proj = nn.Linear(features, 3 * features, bias=False)
        self.down_proj = nn.Linear(3 * features, features, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def layer(name, site):
    (wanted,) = read(str(EXAMPLE))
    build = find(wanted, Place(Target.of(hardware.detect())))
    assert build.folder.name == "torch-cuda"
    return load_layer(LayerSource(build.folder.absolute(), name, site))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [64, 1000, 4096, 5120])
def test_the_example_computes_and_learns_as_torch_does(dtype, features):
    for name, module in (("RMSNorm", Norm(features)), ("SwiGLUMLP", Mlp(features // 4))):
        kind = layer(name, name)
        candidate = Candidate(kind.forward, name, module, "", torch.device("cuda"), dtype)
        found = try_module(candidate)
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert found.value_error < limit and found.gradient_error < limit, (name, found)


def test_its_operators_hold_what_torch_asks_of_operators():
    package = layer("RMSNorm", "RMSNorm").__module__.rpartition(".")[0]
    ops = sys.modules[f"{package}.ops"]
    gate, up = (torch.randn(3, 40, device="cuda", requires_grad=True) for _ in range(2))
    weight = torch.randn(40, device="cuda", requires_grad=True)
    for op, arguments in ((ops.swiglu, (gate, up)), (ops.rms_norm_forward, (gate, weight, 1e-5))):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_many_rows_are_summed_right():
    """More rows than RMSNorm's backward has programs, and a number that does not divide by it."""
    kind, norm = layer("RMSNorm", "RMSNorm"), Norm(256).cuda()
    x = torch.randn(12345, 256, device="cuda", requires_grad=True)
    gradient = torch.randn_like(x)
    expected = torch.autograd.grad(norm(x), [x, norm.weight], gradient)
    found = torch.autograd.grad(kind.forward(norm, x), [x, norm.weight], gradient)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-3)


def test_a_build_for_a_cpu_is_refused_here(tmp_path):
    (wanted,) = read(str(write_kernel(tmp_path / "k")))
    with pytest.raises(JobError, match="has no build for"):
        find(wanted, Place(Target.of(hardware.detect())))


def test_runs_with_kernels_learn_alike_and_keep_fp8_and_adapters(job_file, tmp_path):
    """Eager and compiled; the profile of a step proves that FP8 ran, or the run would stop."""
    activation = write_kernel(tmp_path / "act", ACTIVATION, "torch-cuda", name="activation")
    norm = {"path": str(EXAMPLE), "layers": {"RMSNorm": "RMSNorm"}}
    example = {"use_kernels": True, "kernel_name": str(EXAMPLE)}
    bridged = {"use_kernels": True, "kernel_name": [norm, str(activation)]}
    source = tmp_path / "model-source" / "config.json"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_dropout": 0.0}
    source.write_text(json.dumps(json.loads(source.read_text()) | sizes))
    same = {"pure_bf16": True, "packing": True, "cutoff_len": 64, "learning_rate": 1e-3}
    compiled = {"torch_compile": True}

    def job(name, **keys):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / name), **{**same, **keys})

    jobs = [
        job("plain"),
        job("example", **example),
        job("bridged", **bridged),
        job("compiled", **compiled),
        job("compiled-example", **compiled, **example),
        job("compiled-bridged", **compiled, **bridged),
    ]
    if IS_HOPPER:
        jobs += [job("fp8", **FP8), job("fp8-example", **FP8, **example)]
        jobs += [job("fp8-compiled-example", **FP8, **compiled, **example)]
    (figures, *_) = run_workers(1, *jobs)
    adapters = {
        "model_name_or_path": figures["model_dir"],
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "pure_bf16": False,
        "bf16": True,
    }
    *_, adapted = run_workers(
        1, job("lora", **adapters), job("lora-example", **adapters, **example)
    )
    learned = load_file(Path(adapted["model_dir"]) / "adapter_model.safetensors")
    learned = {name: weight for name, weight in learned.items() if "lora_B" in name}
    assert len(learned) > 6 and all(weight.abs().max() > 0 for weight in learned.values())

    def of(name):
        return list(losses(tmp_path / name).values())

    pairs = {
        "example": "plain",
        "bridged": "plain",
        "compiled-example": "compiled",
        "compiled-bridged": "compiled",
        "lora-example": "lora",
    }
    if IS_HOPPER:
        pairs |= {"fp8-example": "fp8", "fp8-compiled-example": "fp8"}
        assert of("fp8-example") != of("example")
        assert of("fp8-compiled-example") != of("compiled-example")
    for name, reference in pairs.items():
        assert of(name) == pytest.approx(of(reference), rel=5e-3), name
        if reference != "lora":  # six steps of adapters do not yet show in the loss
            assert of(name)[-1] < of(name)[0], name
