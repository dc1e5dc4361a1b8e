"""Conversations that are longer than cutoff_len."""

import numpy as np
from numpy.typing import NDArray


def picked(is_answer: NDArray[np.bool_], cutoff: int, last_first: bool) -> NDArray[np.int64]:
    """Return the indices of the tokens that stay.

    Turn by turn, prompt and answer are shortened at their ends, in proportion if both are long, so
    that a long prompt does not cost the answer; turns for which there is no room are left out.
    `last_first` begins with the last turn, for losses on it alone.

    Source: infer_seqlen and SupervisedDatasetProcessor in LLaMA-Factory 0.9.6
    (src/llamafactory/data/processor).
    """
    left, kept = cutoff, []
    turns = _turns(is_answer)
    for start, answer, end in reversed(turns) if last_first else turns:
        if left <= 0:
            break
        prompt_len, answer_len = _shares(answer - start, end - answer, left)
        kept.append(np.arange(start, start + prompt_len))
        kept.append(np.arange(answer, answer + answer_len))
        left -= prompt_len + answer_len
    return np.sort(np.concatenate(kept))


def _turns(is_answer: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Return where each prompt starts, and its answer starts and ends."""
    borders = [0, *(np.flatnonzero(np.diff(is_answer)) + 1).tolist(), len(is_answer)]
    if is_answer[0]:
        borders.insert(0, 0)
    if len(borders) % 2 == 0:  # something follows the last answer
        borders.append(len(is_answer))
    return list(zip(borders[::2], borders[1::2], borders[2::2], strict=False))


def _shares(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """Return how much of a prompt and of its answer fits."""
    if answer * 2 < room:
        most = room
    elif prompt * 2 < room:
        most = room - prompt
    else:
        most = int(room * (answer / (prompt + answer)))
    answer = min(most, answer)
    return min(room - answer, prompt), answer
