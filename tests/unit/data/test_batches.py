"""The order of sequences, packing, padding; and that packed conversations do not see each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from raytrain_adv.data.batches.collate import PadTo, collate, pad_to
from raytrain_adv.data.batches.order import epoch_permutation, global_batch
from raytrain_adv.data.batches.sequences import Sequence, SequenceSet, TokenRows, pack


def test_permutation_is_the_same_on_every_machine_and_release():
    assert epoch_permutation(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


def test_epochs_and_seeds_differ():
    orders = [epoch_permutation(50, s, e).tolist() for s, e in ((1, 0), (1, 1), (2, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_of_any_size_read_the_same_endless_stream(shuffle):
    n, seed, total = 7, 3, 24
    streams = [
        np.concatenate([global_batch(s, b, n, seed, shuffle) for s in range(total // b)]).tolist()
        for b in (1, 2, 3, 8, 24)
    ]
    assert all(stream == streams[0] for stream in streams)
    assert sorted(streams[0][:n]) == sorted(streams[0][n : 2 * n]) == list(range(n))


def test_order_without_shuffling_is_file_order():
    assert global_batch(1, 4, 6, 0, False).tolist() == [4, 5, 0, 1]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
@settings(max_examples=50)
def test_packing_keeps_every_item_once_and_overfills_nothing(lengths):
    array = np.array(lengths)
    groups = pack(array, 64)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(array[group].sum() <= 64 for group in groups)
    fullest = sorted((64 - array[g].sum() for g in groups), reverse=True)
    assert len(groups) < 2 or fullest[1] < array.max()


def test_packing_fills_what_can_be_filled():
    groups = pack(np.array([60, 30, 4, 34, 64]), 64)
    assert [g.tolist() for g in groups] == [[0, 2], [1, 3], [4]]


def test_packing_100_000_rows_takes_seconds():
    lengths = np.random.default_rng(0).integers(10, 2048, 100_000)
    groups = pack(lengths, 2048)
    assert lengths.sum() / (len(groups) * 2048) > 0.99


def sequence(*segments):
    ids = np.concatenate([np.arange(1, n + 1) + 10 * i for i, n in enumerate(segments)])
    labels = np.append(ids[1:], -100)
    labels[np.cumsum(segments) - 1] = -100
    return Sequence(ids.astype(np.int32), labels.astype(np.int32), segments)


def test_padding_carries_no_label_and_comes_last():
    batch = collate([sequence(3), sequence(5)], pad_token_id=9, pad_to=PadTo(), neat=False)
    assert batch["input_ids"].shape == (2, 16) and batch["input_ids"].dtype == torch.long
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [9] * 13
    assert batch["labels"][0].tolist() == [2, 3] + [-100] * 14
    assert set(batch) == {"input_ids", "labels"}


def test_lengths_under_compile_are_a_handful_of_multiples_of_16(make_job):
    lengths = pad_to(make_job(cutoff_len=1000, torch_compile=True))
    assert lengths.lengths == (128, 256, 512, 1008)
    assert [lengths.length(n) for n in (1, 128, 129, 1000)] == [128, 128, 256, 1008]


def test_packed_batches_always_have_cutoff_len(make_job):
    assert pad_to(make_job(cutoff_len=512, packing=True)).length(3) == 512
    assert pad_to(make_job(cutoff_len=512, neat_packing=True)).length(3) == 512


def test_lengths_without_compile_are_multiples_of_16(make_job):
    lengths = pad_to(make_job(cutoff_len=512))
    assert [lengths.length(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_position_ids_restart_at_each_conversation_and_in_the_padding():
    batch = collate([sequence(3, 2)], pad_token_id=0, pad_to=PadTo((8,)), neat=True)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def logits(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_a_packed_conversation_equal_its_logits_alone(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    rows = [(5, 1, 4), (9,), (2, 6)]
    packed = [sequence(*row) for row in rows]
    batch = collate(packed, pad_token_id=0, pad_to=PadTo((16,)), neat=True)
    together = logits(model, batch)
    for i, row in enumerate(rows):
        start = 0
        for length in row:
            ids = batch["input_ids"][i : i + 1, start : start + length]
            alone = logits(model, {"input_ids": ids})
            found = together[i : i + 1, start : start + length]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
            start += length


def test_without_neat_packing_conversations_do_see_each_other():
    model = tiny_model()
    batch = collate([sequence(5, 4)], pad_token_id=0, pad_to=PadTo((16,)), neat=False)
    alone = logits(model, {"input_ids": batch["input_ids"][:, 5:9]})
    assert not torch.allclose(logits(model, batch)[:, 5:9], alone, atol=1e-3)


def test_padding_does_not_change_the_logits_before_it():
    model = tiny_model()
    batch = collate([sequence(5), sequence(20)], pad_token_id=0, pad_to=PadTo(), neat=False)
    alone = logits(model, {"input_ids": batch["input_ids"][:1, :5]})
    torch.testing.assert_close(logits(model, batch)[:1, :5], alone, atol=1e-5, rtol=1e-5)


def test_attention_costs_what_the_tokens_of_a_sequence_can_see():
    """Over all tokens: 4 of them see 4, 2 see 2, and apart in their pack 3 and 1, 2."""
    offsets = np.array([0, 3, 4, 6])
    rows = TokenRows(np.zeros(6, np.int32), np.ones(6, bool), offsets, np.zeros(3, np.int32))
    packed = SequenceSet(rows, [np.array([0, 1]), np.array([2])])
    assert packed.attention_length(apart=False) == pytest.approx((4 * 4 + 2 * 2) / 6)
    assert packed.attention_length(apart=True) == pytest.approx((3 * 3 + 1 + 2 * 2) / 6)
    assert SequenceSet(rows, []).attention_length(apart=True) == 0.0
