"""Print vLLM's log-probabilities of a folder's compared tokens."""

import os
import sys

from answers import NUM_DECODED, answer, asked  # type: ignore[import-not-found]  # a script's


def main(folder: str) -> None:
    """Answer for each position but the first.

    Multiprocessing is off: the engine then runs in this process, and ends with it.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    tokens, num = asked(folder)
    engine = LLM(
        model=folder,
        enforce_eager=True,
        max_model_len=len(tokens) + NUM_DECODED,
        max_num_seqs=1,
        max_logprobs=num,
        enable_prefix_caching=False,
    )

    def generate(prompt: list[int], **keys: int) -> list[dict[int, float]]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, **keys)
        done = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        at = (done.prompt_logprobs or [None])[1:]
        return [{i: one.logprob for i, one in places.items()} for places in at]

    found = generate(tokens, max_tokens=1, prompt_logprobs=num)
    answer(found, "vllm", lambda: generate(tokens[:1], max_tokens=NUM_DECODED))


if __name__ == "__main__":
    main(sys.argv[1])
