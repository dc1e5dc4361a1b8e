"""Make a small Llama's folder: a byte-level BPE tokenizer of a built-in dataset, and a config.

Run from the repository's root:
    python jobs/models/make_tokenizer.py orders-llama     # the quickstart's: orders as JSON
    python jobs/models/make_tokenizer.py tiny-llama       # questions about the standard library
The second depends a little on the Python whose documentation it is made from; the shipped one was
made with 3.11.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from raytrain_adv.data.read import orders, stdlib_docs
from raytrain_adv.data.read.sources import Row

NUM_READ = 10_000  # rows that a tokenizer is made from
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Model:
    """A folder to make."""

    rows: Callable[[], Iterator[Row]]
    vocab_size: int
    whole: str | None
    """A regular expression of what stays in one piece, or None for the pieces of GPT-2."""
    shape: dict[str, int]
    repetition_penalty: float


JSON_AND_WORDS = r'\{"\w+": "?|"?, "\w+": "?|"?\}| ?\w+| ?[^\w\s]+|\s+'
MODELS = {
    "orders-llama": Model(
        orders.rows, 1024, JSON_AND_WORDS, {"hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 2}, repetition_penalty=1.0,
    ),
    "tiny-llama": Model(
        stdlib_docs.rows, 4096, None, {"hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 4}, repetition_penalty=1.2,
    ),
}  # fmt: skip


def texts(model: Model) -> Iterator[str]:
    """Yield the questions and answers the tokenizer is made for."""
    for row in islice(model.rows(), NUM_READ):
        yield row.values["instruction"]
        yield row.values["output"]


def make_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """Train the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=model.whole is None)
    split = [pre_tokenizers.Split(Regex(model.whole), "isolated")] if model.whole else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, whole]) if split else whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=model.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(model), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Write the model folder."""
    if sys.argv[1:] not in [[name] for name in MODELS]:
        sys.exit(f"usage: python {sys.argv[0]} {' | '.join(MODELS)}")
    folder, model = Path(__file__).parent / sys.argv[1], MODELS[sys.argv[1]]
    tokenizer = make_tokenizer(model)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # every release of transformers knows this name
    )
    del settings["backend"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **model.shape,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, max_new_tokens=96, repetition_penalty=model.repetition_penalty, **ids
    ).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(json.dumps({"folder": str(folder), "bytes": size, "vocab": len(tokenizer)}))


if __name__ == "__main__":
    main()
