"""Inputs of layers in host memory change no number, and are where they are planned to be."""

import gc
import weakref

import pytest
import torch

from raytrain_adv.config.load import load
from raytrain_adv.errors import JobError
from raytrain_adv.model import parallel
from raytrain_adv.model.build import decoder_layers
from raytrain_adv.model.offload import Offload, num_offloaded
from tests.families import tiny_model
from tests.tiny_models import job_for

TOKENS = torch.arange(32).reshape(2, 16)


def trained(moved: int | None, compiled: bool = False, passes: int = 2, mode: str = "full"):
    """Return the gradients of so many passes, and what moved; None checkpoints alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = tiny_model("llama")
    layers = []
    for fqn, layer in decoder_layers(model):
        layer = parallel._checkpointed(layer, mode)
        model.set_submodule(fqn, layer)
        if compiled:
            layer.compile()
        layers.append(layer)
    offload = Offload(layers, moved) if moved is not None else None
    for number in range(passes):
        loss = model(input_ids=TOKENS[:, : 16 - 4 * number], use_cache=False).logits.square().mean()
        loss.backward()
    return [p.grad for p in model.parameters()], offload


COMPILED = [pytest.param(n, True, marks=pytest.mark.slow) for n in (0, 1, 2)]


@pytest.mark.parametrize(("moved", "compiled"), [(0, False), (1, False), (2, False), *COMPILED])
def test_gradients_are_those_of_checkpointing_alone_bit_by_bit(moved, compiled):
    expected, _ = trained(None, compiled)
    found, offload = trained(moved, compiled)
    assert all(map(torch.equal, found, expected))
    assert offload.num_pages == moved == len(offload.free)  # of both passes, given back


@pytest.mark.slow
def test_attentions_results_move_too_where_they_are_kept():
    expected, _ = trained(None, True, mode="attention")
    whole, _ = trained(None, True)
    found, offload = trained(2, True, mode="attention")
    assert all(map(torch.equal, found, expected))
    for one, other in zip(expected, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert offload.num_pages == 4 == len(offload.free)


def test_longer_sequences_replace_the_memory_of_shorter_ones():
    _, offload = trained(2, passes=1)
    before = {pages.nbytes for pages in offload.free}
    longer = [offload._pages(nbytes) for nbytes in (10_000, 10_000)]
    assert offload.num_pages == 2 and not offload.free
    assert {pages.nbytes for pages in longer} == {10_000} != before


def test_an_input_is_not_on_the_device_between_forward_and_backward():
    """On a CPU both are one memory: the tensor is let go of, and the copy has its values."""
    model = tiny_model("llama")
    layers = [parallel._checkpointed(layer, "full") for _, layer in decoder_layers(model)]
    offload = Offload(layers, 1)
    holds, seen = offload._hold, []
    offload._hold = lambda x, *how: seen.append((x.clone(), holds(x, *how))) or seen[-1][1]
    x = torch.randn(2, 16, model.config.hidden_size)
    rotary = model.model.rotary_emb(x, torch.arange(16)[None])
    for layer in layers:
        x = layer(x, position_embeddings=rotary)
    (first, moved), (_, stays) = seen
    assert moved.x is None and torch.equal(moved.copy, first)
    assert stays.x is stays.copy and stays.of.below is moved.of


@pytest.mark.parametrize(
    "backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_nothing_else_holds_an_input_that_was_moved(backend):
    """The hook that packs it did, for as long as the graph: all inputs stayed on the GPU."""
    torch._dynamo.reset()
    model = tiny_model("llama")
    layers = [parallel._checkpointed(layer, "full") for _, layer in decoder_layers(model)]
    for layer in layers if backend else []:
        layer.compile(backend=backend)
    Offload(layers, len(layers))
    x, inputs = torch.randn(2, 16, model.config.hidden_size), []
    rotary = model.model.rotary_emb(x, torch.arange(16)[None])
    for layer in layers:
        inputs.append(weakref.ref(x))
        x = layer(x, position_embeddings=rotary)
    gc.collect()  # frames of the compiler, which a collection in its midst may leave in a cycle
    assert x.requires_grad and [one() for one in inputs] == [None, None]


def test_more_layers_than_the_model_has_are_refused(tmp_path):
    job = job_for("none", tmp_path, activation_offloading=3)
    with pytest.raises(JobError, match="more than the model's layers") as refused:
        num_offloaded(job, 2)
    assert "give at most 2" in refused.value.fix
    assert num_offloaded(job, 3) == 3
    job = job_for("none", tmp_path, activation_offloading=True)
    assert num_offloaded(job, 3) == 2
    with pytest.raises(JobError, match="leaves the last layer's") as refused:
        num_offloaded(job, 1)
    assert "activation_offloading: 1" in refused.value.fix


def test_attentions_results_of_layers_that_are_not_compiled_are_refused(tmp_path):
    keys = {"activation_offloading": True, "gradient_checkpointing": "attention"}
    with pytest.raises(JobError, match="only compiled layers release attention's results"):
        job_for("none", tmp_path, **keys)
    assert job_for("none", tmp_path, torch_compile=True, **keys)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_offloading_without_full_checkpointing_is_refused(tmp_path, mode):
    with pytest.raises(JobError, match="activation_offloading and gradient_checkpointing"):
        job_for("none", tmp_path, activation_offloading=True, gradient_checkpointing=mode)


def test_offloading_without_checkpointing_is_refused_once_by_the_key_that_turns_it_off(tmp_path):
    keys = {"activation_offloading": True, "disable_gradient_checkpointing": True}
    with pytest.raises(JobError, match="set disable_gradient_checkpointing: false"):
        job_for("none", tmp_path, **keys)
    with pytest.raises(JobError, match="1 problem") as refused:
        job_for("none", tmp_path, gradient_checkpointing="full", **keys)
    assert "disable_gradient_checkpointing and gradient_checkpointing" in refused.value.fix


def test_llama_factorys_name_is_understood(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(
        "model_name_or_path: none\ndataset: none.json\noutput_dir: out\nuse_unsloth_gc: true\n"
    )
    assert load(file).parallel.activation_offloading is True
