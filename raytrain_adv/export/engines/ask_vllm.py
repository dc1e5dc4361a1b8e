"""Print vLLM's log-probabilities of a folder's compared tokens."""

import json
import os
import sys
from pathlib import Path

from answers import NUM_DECODED, answer, asked  # type: ignore[import-not-found]  # a script's

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM takes."""


def main(folder: str) -> None:
    """Answer for each position but the first.

    Multiprocessing is off: the engine then runs in this process, and ends with it.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    tokens, num = asked(folder)
    adapter = Path(folder) / "adapter_config.json"
    lora = LoRARequest("adapter", 1, folder) if adapter.is_file() else None
    rank = json.loads(adapter.read_text())["r"] if lora else 1
    engine = LLM(
        model=folder,
        enforce_eager=True,
        max_model_len=len(tokens) + NUM_DECODED,
        max_num_seqs=1,
        max_logprobs=num,
        enable_prefix_caching=False,
        enable_lora=lora is not None,
        max_lora_rank=next(one for one in RANKS if one >= rank),
    )

    def generate(prompt: list[int], **keys: int) -> list[dict[int, float]]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, **keys)
        asks = [{"prompt_token_ids": prompt}]
        (done,) = engine.generate(asks, sampling, use_tqdm=False, lora_request=lora)
        at = (done.prompt_logprobs or [None])[1:]
        return [{i: one.logprob for i, one in places.items()} for places in at]

    found = generate(tokens, max_tokens=1, prompt_logprobs=num)
    answer(found, "vllm", lambda: generate(tokens[:1], max_tokens=NUM_DECODED))


if __name__ == "__main__":
    main(sys.argv[1])
