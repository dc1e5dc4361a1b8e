"""The names of the chat templates, read here so that the job file loads without the data's code."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

_FILE = Path(__file__).parent.parent / "data" / "tokens" / "chat_templates" / "families.yaml"
TEMPLATES: tuple[str, ...] = tuple(re.findall(r"^([^\s#:]+):", _FILE.read_text("utf-8"), re.M))

if TYPE_CHECKING:
    Template = str
else:
    Template = Literal[TEMPLATES]
