"""Weights gathered in float8 under FSDP2 on CPU ranks, against a linear that is not sharded."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torchao.float8 import Float8LinearConfig

from raytrain_adv.dtensor import gather
from raytrain_adv.ops.float8.all_gather import (
    GatheredInFloat8,
    Scale,
    as_plain,
    gather_in_float8,
    update_scales,
)
from raytrain_adv.ops.float8.linear import Float8Linear
from tests.ranks import run_ranks

CONFIG = Float8LinearConfig.from_recipe_name("tensorwise")
TOKENS, WIDTH, ROWS = 96, 64, 208
"""Rows that 2 and 4 ranks divide and 3 do not; no size of a transpose is a size of activations."""


def linear(rows: int, columns: int) -> Float8Linear:
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    return Float8Linear.from_float(plain, CONFIG)


def pass_through(model, x):
    """Return output, and gradients of input and weight."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(torch.ones_like(output) * 1e-3)
    return output.detach(), x.grad, model.weight.grad


def sharded_against_whole(shard_size, offload, scales_known):
    """Return what was found and what was expected, and the type and the rows of the shard.

    Nothing is compared here: a rank that stops would leave the others waiting for it.
    """
    world = torch.distributed.get_world_size()
    sizes, names = (world // shard_size, shard_size), ("replicate", "shard")
    if shard_size == world:
        sizes, names = sizes[1:], names[1:]
    whole, part = linear(ROWS, WIDTH), linear(ROWS, WIDTH)
    gather_in_float8(part)
    fully_shard(
        part,
        mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names),
        offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
    )
    found, expected = [], []
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    for factor in (1.0, 3.0):
        with torch.no_grad():
            whole.weight.mul_(factor)
            as_plain(part.weight).to_local().mul_(factor)
        if scales_known:
            update_scales(part)
        whole.zero_grad()
        part.zero_grad()
        expected += [*pass_through(whole, x), whole.weight.detach().clone()]
        *others, grad = pass_through(part, x)
        found += [*others, gather(grad), gather(as_plain(part.weight))]
    local = part.weight._local_tensor
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return pairs, type(local).__name__, len(local), local.scale.value is not None


def both_against_whole(shard_size, offload):
    return [sharded_against_whole(shard_size, offload, known) for known in (True, False)]


@pytest.mark.parametrize(
    ("ranks", "shard_size", "offload", "rows"),
    [(3, 3, False, [70, 70, 68]), (4, 2, False, [104] * 4), (2, 2, True, [104] * 2)],
    ids=["rows-the-ranks-do-not-divide", "hsdp", "cpu-offload"],
)
def test_gathered_in_float8_is_cast_after_gathering_to_the_bit(
    tmp_path, ranks, shard_size, offload, rows
):
    """With scales that are known before the forward pass, and without."""
    answers = run_ranks(both_against_whole, ranks, tmp_path, shard_size, offload)
    for answer, num_rows in zip(answers, rows, strict=True):
        for (pairs, *shard), scales_known in zip(answer, (True, False), strict=True):
            assert shard == ["GatheredInFloat8", num_rows, scales_known]
            for number, (found, expected) in enumerate(pairs):
                # Weight gradients are a mean over ranks of the same ones: up to its rounding.
                rtol = 1e-2 if number % 4 == 2 else 0
                torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def kept_for_backward(gathers):
    """Return shape -> bytes of the tensors kept for backward, once FSDP2 has freed the weights."""
    layer = nn.Sequential(linear(ROWS, WIDTH), nn.SiLU(), linear(WIDTH, ROWS), linear(48, WIDTH))
    if gathers:
        for module in layer:
            if isinstance(module, Float8Linear):
                gather_in_float8(module)
    layer.compile(backend="aot_eager_decomp_partition")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    update_scales(layer)
    x = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    found = {tuple(t.shape): t.untyped_storage().nbytes() for t in kept}
    output.sum().backward()
    assert x.grad is not None
    return found


@pytest.mark.parametrize("gathers", [True, False])
def test_a_compiled_layer_keeps_no_weight_and_no_transposed_weight_for_backward(tmp_path, gathers):
    (found, _) = run_ranks(kept_for_backward, 2, tmp_path, gathers)
    weights = {(ROWS, WIDTH), (WIDTH, ROWS), (48, WIDTH), (WIDTH, 48)}
    assert found.keys() & weights, "the weights themselves are among what is kept"
    assert {shape: n for shape, n in found.items() if shape in weights and n} == {}
    assert found[TOKENS, WIDTH] or found[WIDTH, TOKENS], "the inputs in float8 are"


def test_code_that_takes_a_weight_is_not_compiled_again_for_each_scale():
    """torchao's 8-bit AdamW was, for each weight in each step."""
    weight = GatheredInFloat8(torch.ones(16, 16), Scale(torch.tensor(1.0)))
    graphs = CompileCounter()
    add = torch.compile(lambda w: w + 1, backend=graphs)
    for value in (1.0, 2.0, 3.0):
        weight.scale.value = torch.tensor(value)
        add(weight)
    assert graphs.frame_count == 1
