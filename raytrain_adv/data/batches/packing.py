"""Putting several conversations into one sequence."""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Group items so that each group's lengths add up to at most `capacity`: greedy best fit,
    longest item first.

    Deterministic: it depends on the lengths alone, equal lengths are taken in index order. A group
    lists its items in index order, and groups are ordered by their first item, so that file order
    survives as far as it can.

    Args:
        lengths: tokens of each item, [items], each at most `capacity`.
        capacity: tokens that fit into a group.

    Returns:
        For each group the indices of its items.
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
