"""Whether the Hugging Face Hub can be reached: asked once, instead of six times for each file."""

import os
from functools import cache
from pathlib import Path
from urllib import request
from urllib.error import HTTPError

from raytrain_adv.errors import JobError

TIMEOUT_S = 5.0
SWITCH = "HF_HUB_OFFLINE"
BAD_GATEWAY = (502, 503, 504)
"""What a proxy answers when it does not reach the Hub."""


def require_model(name: str, revision: str, cache_dir: str | None, near: str = "") -> None:
    """Refuse a model of the Hub that is neither cached on this machine nor can be fetched; `near`
    says which folders a path of this name could have meant. Raises JobError naming why the Hub
    cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(name, "config.json", cache_dir, revision)
    if (reason := why_unreachable()) and not isinstance(known, str):
        raise JobError(
            f"There is no folder {name}, and the model of that name cannot be fetched",
            "\n".join(filter(None, [f"{reason}; the Hub's cache here lacks it too", near])),
            "if it is a folder, correct model_name_or_path; else make the Hub reachable "
            "(HF_ENDPOINT names a mirror)",
        )


@cache
def why_unreachable() -> str:
    """Return why the Hub cannot be reached, empty if it can; if not, this process and those it
    starts read from the Hub's cache alone.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"{SWITCH} is set"
    try:
        request.urlopen(request.Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code not in BAD_GATEWAY:
            return ""  # it answers
        return _offline(f"{constants.ENDPOINT} cannot be reached: a proxy answers {error}")
    except OSError as error:
        return _offline(f"{constants.ENDPOINT} cannot be reached: {error}")
    return ""


def _offline(reason: str) -> str:
    """Make the Hub's client read from its cache alone; return the reason."""
    from huggingface_hub import constants

    os.environ[SWITCH] = "1"
    constants.HF_HUB_OFFLINE = True
    return reason


def require_dataset(name: str, cache_dir: str | None) -> None:
    """Refuse a dataset of the Hub that can be neither fetched nor found on this machine, before
    `datasets` is imported, which takes seconds. Raises JobError, naming why the Hub cannot be
    reached.
    """
    from huggingface_hub import constants

    if not (reason := why_unreachable()):
        return
    own = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    homes = [Path(home) for home in (cache_dir, own, constants.HF_HUB_CACHE) if home]
    kept = (path.name for home in homes if home.is_dir() for path in home.iterdir())
    if not any(_plain(folder).removeprefix("datasets") == _plain(name) for folder in kept):
        what = f"The dataset {name} could not be loaded from the Hugging Face Hub"
        found = f"{reason}; it is not in the Hub's cache on this machine either"
        raise JobError(what, found, "give a local file, or make the Hub reachable")


def _plain(name: str) -> str:
    """Return the letters and digits of a name: folders write the others in several ways."""
    return "".join(c for c in name.lower() if c.isalnum())
