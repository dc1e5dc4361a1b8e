"""From sequences to the tensors of one forward pass."""

from collections.abc import Sequence as Listlike
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.batches.sequences import Sequence
from raytrain_adv.model.sequence_parallel import WHOLE
from raytrain_adv.ops.loss import IGNORE

MULTIPLE = 16
"""Matrix products in 8 bits need the number of tokens of a forward pass to be divisible by 16."""
BOUNDS = 64
"""Bounds of packed conversations come in multiples of it."""
Inputs = dict[str, torch.Tensor | int]
Way = Literal["positions", "masks", "bounds", "flat", "apart"]
"""How a model is told where packed conversations begin: by position ids that restart; by these and
masks made of them; by these and the bounds that flash attention takes; or by all that recurrent
layers take, with the sequences laid end to end; or, laid so, by calling layers once for each."""


@dataclass(frozen=True)
class PadTo:
    """The lengths to which a batch may be padded."""

    lengths: tuple[int, ...] = ()
    """Allowed lengths, ascending; empty allows every multiple."""
    multiple: int = MULTIPLE
    """What all lengths are multiples of."""

    def length(self, longest: int) -> int:
        """Return the padded length of a batch whose longest sequence has `longest` tokens."""
        return next((n for n in self.lengths if longest <= n), _round_up(longest, self.multiple))


def pad_to(job: JobConfig) -> PadTo:
    """Choose the lengths: cutoff_len for packed sequences. Others are padded to the next multiple
    of 16; with torch_compile to an eighth, a quarter, a half or all of it, for few compiled graphs.
    Workers that share sequences get 16 each.
    """
    cutoff, multiple = job.data.cutoff_len, MULTIPLE * job.parallel.sequence_parallel_size
    if job.packs:
        return PadTo((_round_up(cutoff, multiple),), multiple)
    if job.parallel.torch_compile:
        lengths = {_round_up(-(-cutoff // part), multiple) for part in (8, 4, 2, 1)}
        return PadTo(tuple(sorted(lengths)), multiple)
    return PadTo((), multiple)


def collate(
    sequences: Listlike[Sequence], *, pad_token_id: int, pad_to: PadTo, neat: bool
) -> dict[str, torch.Tensor]:
    """Pad sequences on the right and stack them.

    There is no attention_mask: a token never attends to what lies to its right, and padding carries
    no label.

    Args:
        sequences: the B sequences.
        pad_token_id: what stands in padded places.
        pad_to: the lengths allowed.
        neat: whether packed conversations must not see each other. Models of transformers derive
            that from position ids that restart, provided that no attention_mask and no cache
            (use_cache=False) is given. Padding is a separate conversation.

    Returns:
        input_ids, labels (-100 in padding) and, if neat, position_ids: int64 [B, T] each.
    """
    length = pad_to.length(max(len(s.input_ids) for s in sequences))
    shape = (len(sequences), length)
    batch = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "labels": np.full(shape, IGNORE, dtype=np.int64),
    }
    for row, sequence in enumerate(sequences):
        num_tokens = len(sequence.input_ids)
        batch["input_ids"][row, :num_tokens] = sequence.input_ids
        batch["labels"][row, :num_tokens] = sequence.labels
    if neat:
        batch["position_ids"] = np.stack([_restarting(s.segments, length) for s in sequences])
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def tokens_not_padding(sequences: Listlike[Sequence], length: int) -> torch.Tensor:
    """Return 1 at each token of sequences padded to a length, 0 at padding: int64 [B, T]."""
    counts = torch.tensor([len(sequence.input_ids) for sequence in sequences])
    return (torch.arange(length) < counts[:, None]).long()


def bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where conversations begin in packed sequences laid end to end, and their end, as flash
    attention takes it: int32 [conversations + 1], ascending. Empty conversations at the end fill it
    up to a multiple of BOUNDS: few shapes, few compiled graphs.

    Args:
        position_ids: [sequences, time], from 0 in each conversation.
    """
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten().to(torch.int32)
    rows = -(-(len(starts) + 1) // BOUNDS) * BOUNDS
    filled = torch.full((rows,), flat.numel(), dtype=torch.int32)
    filled[: len(starts)] = starts
    return filled


def told(tensors: dict[str, torch.Tensor], way: Way) -> Inputs:
    """Return a model's inputs, with where packed conversations begin in the names of transformers.

    Args:
        tensors: input_ids and position_ids [sequences, time].
        way: how the model is told.
    """
    if way in ("positions", "masks"):
        return {**tensors}
    row = {name: tensor.reshape(1, -1) for name, tensor in tensors.items()}
    if way == "apart":
        return {**row}
    positions = tensors["position_ids"]
    # transformers would find the bounds itself in position_ids, but only of a single sequence: in a
    # batch of several, packed conversations would see each other.
    starts, longest = bounds(positions), positions.shape[1]
    found: Inputs = {**tensors, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    found |= {"max_length_q": longest, "max_length_k": longest}
    if way == "flat":
        number = (row["position_ids"] == 0).cumsum(-1, dtype=torch.int32) - 1
        exact = starts[: int(number.max()) + 2]  # kernels refuse empty conversations
        found |= {**row, "seq_idx": number, "cu_seq_lens_q": exact, "cu_seq_lens_k": exact}
    return found


def part_of(inputs: Inputs, tokens: slice) -> Inputs:
    """Return a model's inputs with some of the tokens of each sequence, for attention that is split
    over the workers which have the others.
    """
    ids: Any = inputs["input_ids"]
    positions: Any = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    whole = positions.contiguous()
    part = {"input_ids": ids[:, tokens], "position_ids": positions[:, tokens]}
    return {**inputs, **{name: x.contiguous() for name, x in part.items()}, WHOLE: whole}


def _restarting(segments: tuple[int, ...], length: int) -> NDArray[np.int64]:
    padding = length - sum(segments)
    return np.concatenate([np.arange(n, dtype=np.int64) for n in (*segments, padding)])


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
