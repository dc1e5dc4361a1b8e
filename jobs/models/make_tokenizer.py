"""Make jobs/models/tiny-llama: a byte-level BPE tokenizer of the quickstart's dataset, and the
config of a small Llama.

Run from the repository's root: python jobs/models/make_tokenizer.py
The result depends a little on the Python whose documentation it is made from; the shipped one was
made with 3.11.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from raytrain_adv.data.read import stdlib_docs

FOLDER = Path(__file__).parent / "tiny-llama"
VOCAB_SIZE = 4096
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


def texts() -> Iterator[str]:
    """Yield the questions and answers the tokenizer is made for."""
    for row in stdlib_docs.rows():
        yield row.values["instruction"]
        yield row.values["output"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
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
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(FOLDER, save_jinja_files=False)
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # every release of transformers knows this name
    )
    del settings["backend"]
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(FOLDER)
    GenerationConfig(
        do_sample=False, max_new_tokens=96, repetition_penalty=1.2, **ids
    ).save_pretrained(FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(json.dumps({"folder": str(FOLDER), "bytes": size, "vocab": len(tokenizer)}))


if __name__ == "__main__":
    main()
