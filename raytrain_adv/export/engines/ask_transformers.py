"""Print transformers' log-probabilities of a folder's compared tokens."""

import json
import sys

from answers import NUM_DECODED, answer, asked, top  # type: ignore[import-not-found]  # a script's


def main(folder: str, changed: str) -> None:
    """Answer for each position but the first. `changed` are keys of config.json, as JSON."""
    from typing import Any

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known, num = asked(folder)
    tokens = torch.tensor([known])
    config = AutoConfig.from_pretrained(folder, **json.loads(changed))
    engine: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto")
    engine.eval()
    with torch.no_grad():
        found = top(engine(input_ids=tokens, use_cache=False).logits[0, :-1], num)
    keys = {"max_new_tokens": NUM_DECODED, "min_new_tokens": NUM_DECODED, "do_sample": False}
    mask = torch.ones_like(tokens[:, :1])
    answer(
        found,
        "transformers",
        lambda: engine.generate(tokens[:, :1], attention_mask=mask, **keys),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
