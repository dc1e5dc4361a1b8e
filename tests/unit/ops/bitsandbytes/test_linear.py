"""Quantized linears compute what bitsandbytes' do, on any number of ranks, and keep only bytes."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from raytrain_adv.dtensor import gather
from raytrain_adv.ops.bitsandbytes.linear import PackedLinear, num_weights
from raytrain_adv.ops.bitsandbytes.quantize import Form
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROWS, COLUMNS, TOKENS = 90, 192, 10
"""Rows that 4 ranks do not divide."""
FORMS = [
    Form("nf4"),
    Form("nf4", nested=True),
    Form("fp4"),
    Form("fp4", nested=True),
    Form("int8"),
]
FLOAT8 = [Form("fp8"), Form("fp8_blocks")]


def names(form):
    return f"{form.kind}{'-nested' if form.nested else ''}"


def plain_linear(dtype, rows=ROWS):
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, rows, dtype=dtype)
    with torch.no_grad():
        linear.weight.normal_(0, 0.02)
        linear.weight[3] = 0.0
        linear.weight[5, 7] = 4.0  # an outlier takes its block's other weights with it
    return linear


def quantized(linear, form):
    layer = PackedLinear.of(linear, form)
    layer.take(linear.weight.detach(), CPU)
    return layer


def of_bitsandbytes(linear, form):
    weight, bias = linear.weight.detach().clone(), nn.Parameter(linear.bias.detach(), False)
    if form.is_int8:
        layer = bnb.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(COLUMNS, ROWS, True, linear.weight.dtype)
        keys = {"compress_statistics": form.nested, "quant_type": form.kind, "module": layer}
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **keys)
    layer.bias = bias
    return layer.to("cpu").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=names)
def test_values_and_gradients_are_bitsandbytes_own_bit_for_bit(form, dtype):
    linear = plain_linear(dtype)
    ours, theirs = quantized(linear, form), of_bitsandbytes(linear, form)
    x = torch.randn(2, TOKENS, COLUMNS, dtype=dtype, requires_grad=True)
    pull = torch.randn(2, TOKENS, ROWS, dtype=dtype)
    one, other = ours(x), theirs(x)
    assert torch.equal(one, other)
    (gradient,), (expected,) = (torch.autograd.grad(y, x, pull) for y in (one, other))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("form", "near"),
    [
        (Form("nf4", True), 0.11),
        (Form("fp4", True), 0.14),
        (Form("int8"), 0.012),
        *[(f, 0.03) for f in FLOAT8],
    ],
)
def test_weights_are_as_near_as_their_kind_allows_and_a_wrong_one_is_seen(form, near):
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.normal_(0, 0.02)
    layer = quantized(linear, form)
    squared, size, worst = layer.distance.tolist()
    assert near / 2 < (squared / size) ** 0.5 < near
    assert 0.5 < worst <= 1.0
    original = linear.weight.detach().float()
    apart = (layer.unpacked().float() - original).norm() / original.norm()
    assert float(apart) == pytest.approx((squared / size) ** 0.5, rel=1e-3)
    other = linear.weight.detach().clone()
    other[1, 2] = float("nan")
    layer.take(other, CPU)
    assert layer.distance[2] > 1.0


@pytest.mark.parametrize("form", [*FORMS, *FLOAT8], ids=names)
def test_it_takes_the_bits_it_states(form):
    linear = plain_linear(torch.bfloat16)
    layer = quantized(linear, form)
    held = sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if n != "bias")
    assert held * 8 / (ROWS * COLUMNS) == form.bits(ROWS, COLUMNS)
    assert form.bits(4096, 14336) == pytest.approx(
        {"int8": 8.0, "fp8": 8.0, "fp8_blocks": 8.25}.get(form.kind, 4.5)
        - (0.373 if form.nested else 0),
        abs=5e-3,
    )
    assert not any(p.requires_grad for p in layer.parameters())
    assert num_weights(layer) == num_weights(linear)


def bytes_of(layer):
    return [gather(p).view(torch.uint8).clone() for n, p in layer.named_parameters() if n != "bias"]


def sharded(form, dtype):
    """Return what a rank finds: whole bytes, output and gradient, and the rows it holds."""
    linear = plain_linear(dtype)
    layer = PackedLinear.of(linear, form)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    layer.take(linear.weight.detach()[layer.region], CPU)
    torch.manual_seed(1)
    x = torch.randn(TOKENS, COLUMNS, dtype=dtype, requires_grad=True)
    output = layer(x)
    output.backward(torch.ones_like(output))
    rows = layer.weight.to_local().shape[0]
    return bytes_of(layer), layer.unpacked(), output.detach(), x.grad, rows


SHARDED = [
    (Form("nf4", True), torch.bfloat16),
    (Form("fp4"), torch.float32),
    (Form("int8"), torch.bfloat16),
    *[(form, torch.bfloat16) for form in FLOAT8],
]


def all_sharded():
    return [sharded(form, dtype) for form, dtype in SHARDED]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Return for each form what each of the same four ranks found."""
    return list(zip(*run_ranks(all_sharded, 4, tmp_path_factory.mktemp("ranks")), strict=True))


@pytest.mark.parametrize("number", range(len(SHARDED)))
def test_shards_hold_the_bytes_that_one_rank_would(number, on_ranks):
    form, dtype = SHARDED[number]
    linear = plain_linear(dtype)
    whole = quantized(linear, form)
    torch.manual_seed(1)
    x = torch.randn(TOKENS, COLUMNS, dtype=dtype, requires_grad=True)
    output = whole(x)
    output.backward(torch.ones_like(output))
    answers = on_ranks[number]
    assert [answer[-1] for answer in answers] == [23, 23, 23, 21]
    for held, values, found, gradient, _ in answers:
        for one, other in zip(held, bytes_of(whole), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(values, whole.unpacked())
        assert torch.equal(found, output)
        assert torch.equal(gradient, x.grad)


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_no_whole_weight_is_kept_for_backward(backend):
    layers = nn.Sequential(
        quantized(plain_linear(torch.bfloat16, COLUMNS), Form("nf4", True)),
        nn.SiLU(),
        quantized(plain_linear(torch.bfloat16), Form("int8")),
    )
    if backend:
        torch._dynamo.reset()
        layers.compile(backend=backend, fullgraph=True)
    shapes = set()

    def pack(tensor):
        shapes.add((tuple(tensor.shape), tensor.dtype))
        return tensor

    x = torch.randn(TOKENS, COLUMNS).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layers(x)
    output.sum().backward()
    assert x.grad is not None and float(x.grad.float().norm()) > 0
    assert ((COLUMNS, COLUMNS // 4), torch.bfloat16) in shapes, "the bytes are among what is kept"
    assert not {shape for shape, _ in shapes} & {(COLUMNS, COLUMNS), (ROWS, COLUMNS)}


def test_blocks_hold_what_checkpoints_with_a_scale_per_block_do():
    """A scale there is the block's largest magnitude over 448; blocks at the edges are smaller."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(200, 328)
    form = Form("fp8_blocks")
    layer = PackedLinear.of(nn.Linear(328, 200, bias=False, dtype=torch.float32), form)
    layer.take(weight, CPU)
    expected = torch.empty_like(weight)
    for down in (slice(0, 128), slice(128, 200)):
        for across in (slice(0, 128), slice(128, 256), slice(256, 328)):
            block = weight[down, across]
            multiplier = (448 / block.abs().max().double()).float()
            values = (block * multiplier).to(torch.float8_e4m3fn).float()
            expected[down, across] = values * multiplier.reciprocal()
    assert torch.equal(layer.unpacked(), expected)
    assert 0.5 < layer.distance[2] <= 1.0
