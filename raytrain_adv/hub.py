"""Whether the Hugging Face Hub can be reached: asked once, instead of six times for each file."""

import os
from functools import cache
from urllib import request
from urllib.error import HTTPError

from raytrain_adv.errors import JobError

TIMEOUT_S = 5.0
SWITCH = "HF_HUB_OFFLINE"


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
    except HTTPError:
        return ""  # it answers, and proxies count
    except OSError as error:
        os.environ[SWITCH] = "1"
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return ""
