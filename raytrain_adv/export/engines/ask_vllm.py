"""Print vLLM's log-probabilities of a folder's compared tokens."""

import json
import os
import sys

import numpy as np


def main(folder: str) -> None:
    """Print FOUND and one mapping from token id to log-probability for each position but the first.

    Multiprocessing is off: the engine then runs in this process, and ends with it.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    known = np.load(f"{folder}/trained_logprobs.npz")
    tokens, num = known["tokens"].tolist(), int(known["ids"].shape[1])
    engine = LLM(
        model=folder,
        enforce_eager=True,
        max_model_len=len(tokens) + 8,
        max_num_seqs=1,
        max_logprobs=num,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=num)
    answer = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0]
    found = [{i: one.logprob for i, one in at.items()} for at in answer.prompt_logprobs[1:]]
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
