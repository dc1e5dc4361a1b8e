"""Print the log-probabilities that a folder's `model.pte` computes, by XNNPACK, of its tokens."""

import sys
from pathlib import Path

import lower_executorch  # type: ignore[import-not-found]  # a script's
from answers import NUM_DECODED, answer, asked, top  # type: ignore[import-not-found]  # a script's


def main(folder: str) -> None:
    """Answer for each position but the first; write the program first if there is none."""
    import torch
    from executorch.runtime import Runtime

    file = Path(folder) / lower_executorch.FILE
    if not file.is_file():
        lower_executorch.main(folder)
    forward = Runtime.get().load_program(str(file)).load_method("forward")
    tokens, num = asked(folder)

    def logits(start: int, ids: list[int]) -> torch.Tensor:
        places = torch.arange(start, start + len(ids))
        found: torch.Tensor = forward.execute([torch.tensor([ids]), places])[0][0]
        return found.clone()

    def decode() -> None:
        token = tokens[0]
        for place in range(NUM_DECODED):
            token = int(logits(place, [token])[-1].argmax())

    # Half at once and half token by token, as when a prompt is read and answered.
    half = len(tokens) // 2
    parts = [logits(0, tokens[:half])]
    parts += [logits(place, tokens[place : place + 1]) for place in range(half, len(tokens) - 1)]
    answer(top(torch.cat(parts), num), "executorch", decode)


if __name__ == "__main__":
    main(sys.argv[1])
