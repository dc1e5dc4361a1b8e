"""The table of every argument in the documentation, kept by its sources."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4] / "docs"))
import arguments  # the documentation's own module


def test_every_argument_of_llamafactory_has_a_verdict_and_a_reason() -> None:
    fates = {name: arguments.fate(name) for name in arguments.names()}
    assert len(fates) > 300
    assert [name for name, (verdict, how) in fates.items() if verdict == "unknown" or not how] == []
    assert fates["deepspeed"][0] == "mapped" and "FSDP2" in fates["deepspeed"][1]
    assert fates["lora_rank"][0] == "same" and fates["use_galore"][0] == "refused"
    assert fates["fp16"] == ("mapped", fates["fp16"][1])
