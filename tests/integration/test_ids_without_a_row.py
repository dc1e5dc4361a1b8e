"""Data with ids for which the model has no row is refused with the plan."""

import pytest
from transformers import AutoTokenizer

from raytrain_adv.config import load
from raytrain_adv.data.prepare import prepare
from raytrain_adv.errors import JobError
from tests.multimodal_models import TOKENIZER
from tests.tiny_models import write_checkpoint


def test_ids_without_a_row_are_found_with_the_plan(job_file, tmp_path):
    rows = tmp_path / "thoughts.json"
    rows.write_text('[{"instruction": "Count.", "input": "", "output": "<think>1</think>2"}]')
    keys = {"train_from_scratch": False, "template": "default", "dataset": str(rows)}
    for size in (4096, 4200):
        folder = tmp_path / f"of_{size}_rows"
        write_checkpoint("llama", folder, vocab_size=size, max_position_embeddings=256)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.save_pretrained(folder)
        job = load(job_file(**keys, model_name_or_path=str(folder)))
        if size > 4096:
            prepare(job, lambda sentence: None)
            continue
        with pytest.raises(JobError, match="no embedding for") as refused:
            prepare(job, lambda sentence: None)
        assert "4096 rows" in refused.value.found and "think" in refused.value.found
