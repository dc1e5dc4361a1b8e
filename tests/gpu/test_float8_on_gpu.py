"""FP8's and AdamW's kernels on a GPU, against torchao and torch, and two ranks on one GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoFloat8Linear

from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.ops.float8 import cast_kernel as kernels
from raytrain_adv.ops.float8.cast import (
    cast,
    cast_both,
    cast_padded,
    cast_transposed,
    tensorwise_scale,
    transposed,
)
from raytrain_adv.ops.float8.head_loss import Float8Head
from raytrain_adv.ops.float8.linear import Float8Linear, linear
from raytrain_adv.ops.float8.row_cast import cast_on_gpu, define
from raytrain_adv.ops.float8.row_kernel import wrong_casts
from raytrain_adv.ops.float8.row_linear import RowwiseLinear
from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap, linear_cross_entropy
from raytrain_adv.worker.checks.step import clip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a GPU with FP8 (compute capability 9.0)",
    ),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(16, 48), (8192, 4096), (1000, 1040), (17, 33)])
def test_the_cast_kernel_is_the_cast_to_the_bit(dtype, shape):
    tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tensor[0, 0], tensor[-1, -1] = float("nan"), 1e30
    scale = tensorwise_scale(torch.randn(shape, device="cuda"), dtype)
    expected = cast(tensor, scale, dtype).view(torch.uint8)
    plain, turned = cast_both(tensor, scale, dtype)
    assert torch.equal(plain.view(torch.uint8), expected)
    assert torch.equal(turned.view(torch.uint8), expected.t())
    again = cast_transposed(tensor, scale, dtype, scale)
    assert torch.equal(again.view(torch.uint8), expected.t())
    assert torch.equal(transposed(plain, scale).view(torch.uint8), expected.t())


@pytest.mark.parametrize("tokens", [700, 9000])
def test_a_heads_loss_is_bf16s_and_its_gradients_are_float8s_rounding_off(tokens):
    """9,000 tokens are two groups, the second padded."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    rows = torch.randn(tokens, 256, **options, requires_grad=True)
    head = Float8Head.from_float(torch.nn.Linear(256, 32_000, bias=False, **options))
    head.weight.data.normal_(std=0.1)
    labels = torch.randint(0, 32_000, (tokens,), device="cuda")
    labels[100:300] = -100
    ours = head.cross_entropy(rows, labels, LogitMap())
    exact = linear_cross_entropy(rows, head.weight, None, labels, LogitMap())
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)
    found, expected = (
        torch.autograd.grad(loss * 0.3711, (rows, head.weight)) for loss in (ours, exact)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() < 0.06 * other.float().norm()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 256), (96, 512), (1000, 1040), (17, 33)])
def test_every_tile_casts_to_the_bit(monkeypatch, shape, source):
    """The tuner takes any of them: which one is chance where they are equally fast."""
    monkeypatch.setattr(kernels, "TRIED", shape)
    assert kernels.wrong_tiles(source, torch.device("cuda")) == []


def test_a_tile_that_is_compiled_wrongly_is_found(monkeypatch):
    """As triton 3.6 compiles the cast with its transpose for float32, wrong from the second row."""
    launch = kernels.launch

    def astray(source, scale, plain, transposed):
        launch(source, scale, plain, transposed)
        transposed.view(torch.uint8)[1, 1] += 1

    monkeypatch.setattr(kernels, "launch", astray)
    wrong = kernels.wrong_tiles(torch.bfloat16, torch.device("cuda"))
    assert len(wrong) == 2 * len(kernels.TILES) and "float8_e4m3fn" in wrong[0]


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8192, 4096), (1008, 1040), (17, 33)])
def test_casts_by_row_are_the_defined_ones_to_the_bit(source, shape):
    assert wrong_casts(source, torch.device("cuda")) == []
    sizes = torch.exp(4 * torch.randn(shape[0], 1, device="cuda"))
    tensor = (torch.randn(shape, device="cuda") * sizes).to(source)
    tensor[0], tensor[-1] = 0, tensor[-1] * 1e-11
    for wanted in ((True, True), (True, False), (False, True)):
        found, expected = cast_on_gpu(tensor, *wanted), define(tensor, *wanted)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_gradients_of_small_batches_are_finite_and_near_the_exact_ones(tokens, dtype):
    """In float32 they came out not finite, of a transposed cast that was compiled wrongly."""
    torch.manual_seed(0)
    for i, o in ((256, 256), (256, 128), (256, 512), (512, 256)):
        x = torch.randn(tokens, i, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(o, i, device="cuda", dtype=dtype, requires_grad=True)
        gradient = 1e-5 * torch.randn(tokens, o, device="cuda", dtype=dtype)
        linear(x, weight, None, True).backward(gradient)
        exact = gradient.float().t() @ x.detach().float()
        assert (weight.grad.float() - exact).norm() < 0.1 * exact.norm(), (i, o)
        exact = gradient.float() @ weight.detach().float()
        assert (x.grad.float() - exact).norm() < 0.1 * exact.norm(), (i, o)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8192, 4096), (1000, 1040), (17, 33), (0, 64)])
def test_the_cast_before_the_gather_is_the_cast_to_the_bit(source, shape):
    tensor = torch.randn(shape, device="cuda", dtype=source)
    if tensor.numel():
        tensor[0, 0], tensor[-1, -1] = float("nan"), 1e30
    scale = tensorwise_scale(torch.randn(64, 64, device="cuda"), torch.float8_e4m3fn)
    found = cast_padded(tensor, scale, torch.float8_e4m3fn, shape[0] + 3)
    expected = cast(tensor, scale, torch.float8_e4m3fn)
    assert found.shape == (shape[0] + 3, shape[1])
    assert torch.equal(found[: shape[0]].view(torch.uint8), expected.view(torch.uint8))


def passed(linear, x, gradient):
    x = x.clone().requires_grad_()
    output = linear(x)
    output.backward(gradient)
    return [output.detach(), x.grad, linear.weight.grad]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [16, 48, 4096])
def test_the_linear_is_torchaos_to_the_bit(recipe, tokens):
    torch.manual_seed(0)
    config = Float8LinearConfig.from_recipe_name(recipe)
    kind = Float8Linear if recipe == "tensorwise" else RowwiseLinear
    plain = torch.nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16, device="cuda")
    torchao = TorchaoFloat8Linear.from_float(copy.deepcopy(plain), config)
    ours = kind.from_float(copy.deepcopy(plain), config)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16) * 1e-3
    for own, theirs in zip(passed(ours, x, gradient), passed(torchao, x, gradient), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_steps_as_torchs_on_clipped_gradients(dtype):
    """In float32 to rounding of the last place; in bf16 torch rounds the clipped gradient too."""
    torch.manual_seed(0)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    first = [torch.randn(n, device="cuda", dtype=dtype).requires_grad_() for n in (7, 4096, 99999)]
    second = [p.detach().clone().requires_grad_() for p in first]
    own, theirs = ClippingAdamW(first, **options), torch.optim.AdamW(second, fused=True, **options)
    for _ in range(5):
        for one, other in zip(first, second, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        norms = [clip(optimizer, 0.5) for optimizer in (own, theirs)]
        assert norms[0] == norms[1] and norms[0] > 0.5
        own.step()
        theirs.step()
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-2, 1e-2)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
        torch.testing.assert_close(
            own.state[one]["exp_avg"], theirs.state[other]["exp_avg"], rtol=rtol, atol=atol
        )
    theirs.load_state_dict(own.state_dict())  # and back: the count has moved to the GPU
    own.load_state_dict(theirs.state_dict())
    own.step()
    assert own.state[first[0]]["step"] == 6


RANKS = """
import json, sys
import torch, torch.distributed as dist
from raytrain_adv.config import load
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train
torch.cuda.set_device(0)
dist.init_process_group("gloo")
for path in sys.argv[1:]:
    job = load(path)
    run = Run(
        device=torch.device("cuda", 0),
        storage=Storage.at(job.output.output_dir + "/checkpoints"),
        attempt="local",
        reporter=SilentReporter(),
        cpu_group=dist.new_group(backend="gloo"),
        resume=job.output.resume_from_checkpoint or False,
    )
    figures = train(job, run, export_model)
    if run.is_main:
        print("PROOF", json.dumps(figures["proof"]), flush=True)
dist.destroy_process_group()
"""


def run_ranks(count: int, *jobs: Path) -> str:
    """Run jobs on ranks that share the GPU, over gloo (nccl refuses two ranks on one device)."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", RANKS, *map(str, jobs)],
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": "0"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [p.communicate(timeout=400)[0] for p in processes]
    codes = [p.returncode for p in processes]
    assert codes == [0] * count, "\n".join([f"exit codes {codes}", *outputs])
    return outputs[0]


def test_two_ranks_on_one_gpu_gather_in_fp8_without_changing_a_bit(job_file, tmp_path):
    """Losses equal with fp8 all-gather and without; a checkpoint of 2 ranks goes on on 1."""
    from tests.workers import losses

    fp8 = {"fp8": True, "fp8_min_features": 16, "pure_bf16": True}
    saved = {"save_strategy": "steps", "save_steps": 3}
    gathered = {**fp8, "fp8_enable_fsdp_float8_all_gather": True}

    def job(name, folder, **changed):
        return job_file(f"{name}.yaml", output_dir=str(tmp_path / folder), **changed)

    two = {"gradient_accumulation_steps": 1}
    out = run_ranks(
        2,
        job("bf16", "bf16", pure_bf16=True, **two),
        job("fp8", "fp8", **fp8, **two),
        job("gathered", "gathered", **gathered, **saved, **two),
    )
    assert '"aten::_scaled_mm"' in out
    found, local = losses(tmp_path / "gathered"), losses(tmp_path / "fp8")
    assert found == local
    reference = losses(tmp_path / "bf16")
    assert found != reference
    assert list(found.values()) == pytest.approx(list(reference.values()), rel=5e-3)
    last = tmp_path / "gathered" / "checkpoints" / "local" / "step_00000006" / "manifest.json"
    last.unlink()
    again = {**gathered, **saved, "resume_from_checkpoint": True}
    run_ranks(1, job("again", "gathered", gradient_accumulation_steps=2, **again))
    assert list(losses(tmp_path / "gathered").values()) == pytest.approx(
        list(found.values()), rel=2e-3
    )


def test_a_float32_run_trains_in_fp8_as_without(job_file, tmp_path):
    """Eager steps of a small model had gradients that were not finite."""
    from tests.workers import losses, run_workers

    jobs = {
        "float32": job_file("a.yaml", output_dir=str(tmp_path / "float32")),
        "fp8": job_file("b.yaml", output_dir=str(tmp_path / "fp8"), fp8=True, fp8_min_features=16),
    }
    run_workers(1, *jobs.values())
    expected, found = (list(losses(tmp_path / name).values()) for name in jobs)
    assert found != expected and found == pytest.approx(expected, rel=2e-2)
