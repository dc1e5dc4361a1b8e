"""Training sequences, read from memory-mapped tokens: one conversation each, or several packed."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raytrain_adv.ops.loss import IGNORE


@dataclass(frozen=True)
class Sequence:
    """One training sequence of T tokens."""

    input_ids: NDArray[np.int32]
    """[T]"""
    labels: NDArray[np.int32]
    """[T], already shifted: labels[t] is the token that follows input_ids[t], or -100 where no loss
    is taken."""
    segments: tuple[int, ...]
    """Lengths of the conversations in it, in order; they add up to T."""


@dataclass(frozen=True)
class TokenRows:
    """Tokenized conversations, one after the other, as in the cache."""

    ids: NDArray[np.int32]
    """[tokens], memory-mapped"""
    trained: NDArray[np.bool_]
    """[tokens], memory-mapped: whether the loss is taken on predicting this token"""
    offsets: NDArray[np.int64]
    """[rows + 1]: row r is ids[offsets[r]:offsets[r + 1]]"""
    answer_starts: NDArray[np.int32]
    """[rows]: where in its row the last answer begins"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: [rows]."""
        return np.diff(self.offsets)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Return the token ids of one row: [T]."""
        return np.array(self.ids[self.offsets[row] : self.offsets[row + 1]])

    def labels(self, row: int) -> NDArray[np.int32]:
        """Return the shifted labels of one row: [T]; the last is -100, so rows can be joined."""
        start, end = self.offsets[row], self.offsets[row + 1]
        labels = np.full(end - start, IGNORE, dtype=np.int32)
        labels[:-1] = np.where(self.trained[start + 1 : end], self.ids[start + 1 : end], IGNORE)
        return labels

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Tokens of each row on which the loss is taken: [rows]."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        counts = np.add.reduceat(self.trained, self.offsets[:-1], dtype=np.int64)
        return counts - self.trained[self.offsets[:-1]]  # nothing precedes a row's first token


class SequenceSet:
    """Sequences by index; each is made of one or several rows of the token store."""

    def __init__(self, rows: TokenRows, members: list[NDArray[np.int64]]) -> None:
        """Join rows `members[i]` into sequence i."""
        self.rows = rows
        self.members = members
        self.lengths = np.array([rows.lengths[m].sum() for m in members], dtype=np.int64)
        """Tokens of each sequence: [sequences]."""

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sequence:
        members = self.members[index]
        return Sequence(
            input_ids=np.concatenate([self.rows.tokens(m) for m in members]),
            labels=np.concatenate([self.rows.labels(m) for m in members]),
            segments=tuple(int(self.rows.lengths[m]) for m in members),
        )

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))

    def attention_length(self, apart: bool) -> float:
        """Return the mean over all tokens of the length that each one's attention spans.

        `apart`: packed conversations do not see each other.
        """
        parts = [self.rows.lengths[m] for m in self.members] if apart else [self.lengths]
        lengths = np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
        return float((lengths**2).sum() / max(lengths.sum(), 1.0))

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Label tokens of each sequence: [sequences]."""
        return np.array([self.rows.label_counts[m].sum() for m in self.members], dtype=np.int64)


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Group items so that each group's lengths add up to at most `capacity`: greedy best fit,
    longest item first; return the indices of each group's items.

    It depends on the lengths alone; equal lengths are taken in index order. A group lists its items
    in index order, and groups are ordered by their first item, which keeps file order if possible.

    Args:
        lengths: tokens of each item, [items], each at most `capacity`.
        capacity: tokens that fit into a group.
    """
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}  # room left -> groups with that much room
    rooms: list[int] = []  # keys of open_groups, ascending
    shortest = int(lengths.min()) if len(lengths) else 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room = rooms[at]
            group = open_groups[room].pop()
            if not open_groups[room]:
                del open_groups[room], rooms[at]
        groups[group].append(item)
        left = room - length
        if left >= shortest:
            if left not in open_groups:
                open_groups[left] = []
                insort(rooms, left)
            open_groups[left].append(group)
    ordered = sorted(sorted(group) for group in groups)
    return [np.array(group, dtype=np.int64) for group in ordered]
