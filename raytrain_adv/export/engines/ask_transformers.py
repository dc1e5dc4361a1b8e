"""Print transformers' log-probabilities of a folder's compared tokens."""

import json
import sys

import numpy as np


def main(folder: str) -> None:
    """Print FOUND and, for each position but the first, log-probabilities by token id."""
    from typing import Any

    import torch
    from transformers import AutoModelForCausalLM

    known = np.load(f"{folder}/trained_logprobs.npz")
    tokens = torch.from_numpy(known["tokens"]).long().unsqueeze(0)
    engine: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    values, ids = logits.log_softmax(-1).topk(known["ids"].shape[1])
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    print("FOUND " + json.dumps([dict(zip(*pair, strict=True)) for pair in pairs]))


if __name__ == "__main__":
    main(sys.argv[1])
