"""Print llama.cpp's log-probabilities of a folder's compared tokens."""

import json
import os
import sys
from typing import Any

from answers import NUM_DECODED, answer, asked  # type: ignore[import-not-found]  # a script's

MOST = 64
"""Positions that are asked: each is a request of its own."""


def main(folder: str) -> None:
    """Answer for the first MOST positions but one."""
    import xllamacpp

    tokens, num = asked(folder)
    keys = xllamacpp.CommonParams()
    keys.model.path = f"{folder}/model.gguf"
    keys.n_ctx, keys.n_parallel = len(tokens) + 64, 1
    if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):
        keys.cpuparams.n_threads = keys.cpuparams_batch.n_threads = threads  # they wait actively
    engine = xllamacpp.Server(keys)

    def complete(prompt: list[int], **keys: Any) -> list[Any]:
        asks = {"prompt": prompt, "temperature": 0.0, "cache_prompt": True, **keys}
        done = engine.handle_completions(asks)
        done = done if isinstance(done, dict) else json.loads(done)
        return list((done["choices"][0].get("logprobs") or {}).get("content", []))

    found = []
    for end in range(1, min(len(tokens), MOST)):
        (at,) = complete(tokens[:end], n_predict=1, n_probs=num, logprobs=num)
        found.append({one["id"]: one["logprob"] for one in at["top_logprobs"]})
    answer(
        found,
        "xllamacpp",
        lambda: complete(tokens[:1], n_predict=NUM_DECODED, ignore_eos=True, cache_prompt=False),
    )


if __name__ == "__main__":
    main(sys.argv[1])
