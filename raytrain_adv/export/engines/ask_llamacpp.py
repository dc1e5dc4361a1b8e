"""Print llama.cpp's log-probabilities of a folder's compared tokens."""

import json
import sys

import numpy as np

MOST = 48
"""Positions that are asked: each is a request of its own."""


def main(folder: str) -> None:
    """Print FOUND and, for each position but the first, log-probabilities by token id."""
    import xllamacpp

    known = np.load(f"{folder}/trained_logprobs.npz")
    tokens, num = known["tokens"].tolist(), int(known["ids"].shape[1])
    keys = xllamacpp.CommonParams()
    keys.model.path = f"{folder}/model.gguf"
    keys.n_ctx, keys.n_parallel = len(tokens) + 64, 1
    engine = xllamacpp.Server(keys)
    found = []
    for end in range(1, min(len(tokens), MOST)):
        asked = {"prompt": tokens[:end], "n_predict": 1, "temperature": 0.0, "cache_prompt": True}
        answer = engine.handle_completions({**asked, "n_probs": num, "logprobs": num})
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        (at,) = answer["choices"][0]["logprobs"]["content"]
        found.append({one["id"]: one["logprob"] for one in at["top_logprobs"]})
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
