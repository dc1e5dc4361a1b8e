"""Make what the quality benchmark trains on: the Python code that is on this machine, a tokenizer
of it, and the config of a Llama with 98 million parameters.

Run from the repository's root: python jobs/benchmarks/python_code/make.py [saves/python_code]
Fine-tuning gets the package with the most code, which has its authors' own style; pretraining gets
the others and the standard library. Nothing is imported, nothing is fetched. The result depends on
what is installed; summary.json says what was found.
"""

import hashlib
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 16_384
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}{{ '# ' + message['content'] + '\n' }}"
    "{%- endfor %}"
)
PIECE = 3000
"""Characters of a row, about; it ends where a line does."""
SHORTEST = 400
MOST = {"pretraining": 120_000_000, "finetuning": 40_000_000}
"""Characters that are taken, at most."""
TOKENIZER_SAMPLE = 20_000_000


def sources(roots: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each Python file below some folders, each text once, in an order
    that mixes the folders.
    """
    seen: set[bytes] = set()
    files = [
        (hashlib.sha256(str(file.relative_to(root.parent)).encode()).digest(), root, file)
        for root in roots
        for file in root.rglob("*.py")
        if "site-packages" not in file.relative_to(root).parts
    ]
    for _, root, file in sorted(files, key=lambda found: found[0]):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen and len(text) >= SHORTEST:
            seen.add(digest)
            yield str(file.relative_to(root.parent)), text


def packages() -> list[Path]:
    """Return the folders of installed packages, the one with the most code first."""
    paths = [Path(path) for path in dict.fromkeys((*site.getsitepackages(), *sys.path))]
    folders = [
        folder
        for path in paths
        if path.name in ("site-packages", "dist-packages") and path.is_dir()
        for folder in path.iterdir()
        if folder.is_dir()
    ]
    return sorted(folders, key=lambda f: -sum(p.stat().st_size for p in f.rglob("*.py")))


def pieces(name: str, text: str) -> Iterator[dict[str, str]]:
    """Cut a file into rows at ends of lines."""
    lines: list[str] = []
    part = size = 0
    for line in text.splitlines():
        lines.append(line[:PIECE])
        size += len(lines[-1]) + 1
        if size >= PIECE:
            yield {"instruction": f"{name}, part {part}", "output": "\n".join(lines)}
            lines, size, part = [], 0, part + 1
    if size >= SHORTEST:
        yield {"instruction": f"{name}, part {part}", "output": "\n".join(lines)}


def write_rows(file: Path, files: Iterable[tuple[str, str]], most: int) -> dict[str, int]:
    """Write rows until there are `most` characters; return how much was written."""
    count = {"files": 0, "rows": 0, "characters": 0}
    with file.open("w", encoding="utf-8") as out:
        for name, text in files:
            if count["characters"] >= most:
                break
            count["files"] += 1
            for row in pieces(name, text):
                count["rows"] += 1
                count["characters"] += len(row["output"])
                out.write(json.dumps(row) + "\n")
    return count


def texts(file: Path) -> Iterator[str]:
    """Yield rows' code until the tokenizer has seen enough."""
    size = 0
    with file.open(encoding="utf-8") as rows:
        for line in rows:
            text = json.loads(line)["output"]
            size += len(text)
            yield text
            if size >= TOKENIZER_SAMPLE:
                return


def write_model(folder: Path, file: Path) -> None:
    """Write the tokenizer of the code and the model's config."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(file), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder, save_jinja_files=False)
    LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)


def main() -> None:
    """Write the data, the model folder and a summary."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "saves/python_code")
    folder.mkdir(parents=True, exist_ok=True)
    largest, *others = packages()
    found = {
        "pretraining": sources([*others, Path(sysconfig.get_path("stdlib"))]),
        "finetuning": sources([largest]),
    }
    summary: dict[str, dict[str, int | str]] = {
        name: {**write_rows(folder / f"{name}.jsonl", files, MOST[name])}
        for name, files in found.items()
    }
    info = {name: {"file_name": f"{name}.jsonl"} for name in found}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
    write_model(folder / "llama-98m", folder / "pretraining.jsonl")
    summary["finetuning"]["package"] = largest.name
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
