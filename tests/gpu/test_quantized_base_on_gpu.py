"""QLoRA on a GPU: bitsandbytes' CUDA kernels, FSDP2 over one rank, compiled layers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from raytrain_adv.config import load
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear, apart_from_bitsandbytes
from raytrain_adv.ops.bitsandbytes.quantize import Form
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.train import train
from tests.workers import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FORMS = [
    Form("nf4"),
    Form("nf4", nested=True),
    Form("fp4"),
    Form("fp4", nested=True),
    Form("int8"),
]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def names(form: Form) -> str:
    return f"{form.kind}{'-nested' if form.nested else ''}"


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def layer_of(weight: torch.Tensor, form: Form, device: torch.device) -> PackedLinear:
    rows, columns = weight.shape
    plain = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
    layer = PackedLinear.of(plain, form).to_empty(device=device)
    layer.take(weight, device)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=names)
def test_values_and_gradients_are_bitsandbytes_own_bit_for_bit(
    form: Form, dtype: torch.dtype
) -> None:
    assert apart_from_bitsandbytes(form, GPU, dtype) == []


@pytest.mark.parametrize("form", [Form("nf4", True), Form("fp4"), Form("int8")], ids=names)
def test_a_compiled_linear_computes_as_the_eager_one_and_keeps_no_whole_weight(form: Form) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = layer_of(0.02 * torch.randn(1024, 512, dtype=torch.bfloat16), form, GPU)
    x = torch.randn(2048, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    pull = torch.randn(2048, 1024, device=GPU, dtype=torch.bfloat16)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected, x, pull)
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = torch.compile(layer, fullgraph=True)(x)
    (other,) = torch.autograd.grad(found, x, pull)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other, gradient, rtol=1e-2, atol=1e-2)
    assert tuple(layer.weight.shape) in shapes and (1024, 512) not in shapes


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_a_cpu_rounds_weights_as_a_gpu_does(form: Form) -> None:
    """A checkpoint is exported on a CPU, which quantizes the base anew."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(4096, 1024, dtype=torch.bfloat16)
    one, other = layer_of(weight, form, GPU), layer_of(weight, form, CPU)
    held = [layer.weight.cpu().view(torch.uint8) for layer in (one, other)]
    share = float((held[0] != held[1]).float().mean())
    values = [layer.unpacked().cpu().float() for layer in (one, other)]
    apart = float((values[0] - values[1]).norm() / values[1].norm())
    print(f"{names(form)}: {share:.2e} of the bytes differ, values {apart:.2e} apart")
    # bitsandbytes' two fp4 roundings meet their thresholds differently (seen: 1.2 %, 1.1 %).
    allowed = 2e-2 if form.kind == "fp4" else 1e-3
    assert share < allowed and apart < allowed


@pytest.fixture
def base(keys: dict[str, Any], job_file: Any, tmp_path: Path) -> Path:
    config = Path(keys["model_name_or_path"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SIZES))
    job = load(job_file("base.yaml", output_dir=str(tmp_path / "base"), bf16=True))
    train(job, local_run(job), export_model)
    return tmp_path / "base" / "model"


def dequantized(folder: Path, out: Path) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            held, state = bnb.functional.quantize_4bit(
                weight.cuda(), compress_statistics=True, quant_type="nf4"
            )
            tensors[name] = bnb.functional.dequantize_4bit(held, state).cpu()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_qlora_is_lora_on_the_dequantized_base(
    base: Path, job_file: Any, tmp_path: Path, compiled: bool
) -> None:
    """Bit for bit where layers are eager; compiled ones fuse other sums in the two."""
    lora = {
        "train_from_scratch": False,
        "finetuning_type": "lora",
        "bf16": True,
        "torch_compile": compiled,
        "cutoff_len": 512,
        "packing": True,
        "val_size": 8,
    }
    found = {}
    for name, model, keys in (
        ("qlora", base, {"quantization_bit": 4}),
        ("plain", dequantized(base, tmp_path / "whole"), {}),
        ("int8", base, {"quantization_bit": 8}),
    ):
        torch._dynamo.reset()
        folders = {"model_name_or_path": str(model), "output_dir": str(tmp_path / name)}
        job = load(job_file(f"{name}.yaml", **{**lora, **folders, **keys}))
        figures = train(job, local_run(job), export_model)
        found[name] = losses(tmp_path / name)
        if keys:
            proof = figures["proof"]["qlora"]
            assert proof["calls"] >= proof["modules"] == 14
            notes = figures["transforms"]["qlora"].notes
            assert any("bit for bit on cuda" in note for note in notes)
            assert any("what rounding explains" in note for note in notes)
    assert found["qlora"][6] < found["qlora"][1]
    if compiled:
        assert list(found["qlora"].values()) == pytest.approx(list(found["plain"].values()), 2e-3)
    else:
        assert found["qlora"] == found["plain"]
