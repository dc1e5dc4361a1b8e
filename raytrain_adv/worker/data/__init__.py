"""The job's data: found, read, tokenised once, packed, put in order, and padded into batches."""

from raytrain_adv.worker.data.collate import PadTo, bounds, collate, pad_to
from raytrain_adv.worker.data.order import epoch_permutation, global_batch
from raytrain_adv.worker.data.prepare import PreparedData, Prompt, prepare
from raytrain_adv.worker.data.sequences import IGNORE, Sequence, SequenceSet
from raytrain_adv.worker.data.tokenizer import load_tokenizer

__all__ = [
    "IGNORE",
    "PadTo",
    "PreparedData",
    "Prompt",
    "Sequence",
    "SequenceSet",
    "bounds",
    "collate",
    "epoch_permutation",
    "global_batch",
    "load_tokenizer",
    "pad_to",
    "prepare",
]
