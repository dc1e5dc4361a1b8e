"""Numbers, counts, lists and names as people read them: console, log, report, errors."""

import difflib
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

GIB = 2**30
MISSING = "-"
KEPT = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def clean(text: str) -> str:
    """Return the text without what changes how a terminal shows the rest: control characters and
    those that turn the direction of writing. Line breaks, and the spaces and joiners of all
    scripts, stay.
    """
    return "".join(c if _is_harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in KEPT or unicodedata.category(c) in ("Zs", "Cs")


def clock(seconds: float | None) -> str:
    """Return a duration as 0:07, 1:23, 2:03:04 or 3d 02:03."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(round(seconds), 0)
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days, hours = divmod(hours, 24)
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def seconds(value: float | None) -> str:
    """Return a measured time with its unit, as 12 ms, 0.53 s, 41 s or 2:05 min."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 0.0995:
        return f"{value * 1000:.3g} ms"
    if value < 9.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    return f"{clock(value)} {'min' if value < 3599.5 else 'h'}"


def loss(value: float | None) -> str:
    """Return a loss with four places; below 0.1 with three digits, as small ones have none else."""
    if value is None:
        return MISSING
    return f"{value:#.3g}" if 0 < abs(value) < 0.1 else f"{value:.4f}"


def compact(value: float | None) -> str:
    """Return a positive number in at most seven characters, as 12.3, 0.81, 3.1e-05 or 1.2e+09."""
    if value is None:
        return MISSING
    if value == 0 or 0.0095 <= abs(value) < 99.95:
        return f"{value:.2f}"
    return f"{value:.1f}" if 1 <= abs(value) < 9999.5 else f"{value:.1e}"


def rate(value: float | None) -> str:
    """Return tokens per second: 12,345, and with one place below 100."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def learning_rate(value: float | None) -> str:
    """Return a learning rate as 9.85e-05."""
    return MISSING if value is None else f"{value:.2e}"


def percent(share: float | None) -> str:
    """Return a share as 41.6 %."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def gib(value: float | None) -> str:
    """Return an amount of memory in GiB, as 61.3."""
    return MISSING if value is None else f"{value:.1f}"


def disk(gib: float) -> str:
    """Return a size on disk given in GiB with its unit, as 15.0 GiB, 340 MiB or 85 KiB."""
    if gib >= 0.995:
        return f"{gib:.1f} GiB"
    mib = gib * 1024
    return f"{mib:.0f} MiB" if mib >= 0.995 else f"{mib * 1024:.0f} KiB"


def count(value: float | None) -> str:
    """Return a whole number with thousands separated."""
    return MISSING if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """Return 1 step, 2 steps, 1,234 steps."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def of_error(error: BaseException) -> str:
    """Return an error's kind and the first line of its text, as ValueError: no such key."""
    return f"{type(error).__name__}: {first_line(error)}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the names, comma-separated: the first `most`, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def split_names(given: str | Sequence[str] | None) -> list[str]:
    """Return the names of a key that takes them comma-separated or as a list."""
    several = given.split(",") if isinstance(given, str) else given or ()
    return [name.strip() for name in several if name.strip()]


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of the names, or None; `cutoff` is the least similarity, 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), None)


def ascii_name(name: str) -> str:
    """Return a name in ASCII, for systems that take nothing else: without accents and other
    letters, and with a hash that keeps names apart: saves_é becomes saves_e-1f0c2b.
    """
    if name.isascii():
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{plain.strip() or 'run'}-{digest}"


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text from elsewhere holds. Raises ValueError for whatever is wrong with
    it: json.loads raises RecursionError where it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def first_line(error: object) -> str:
    """Return the first line of an exception's message, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def as_yaml(value: Any) -> str:
    """Return a value on one line, as a job file would have it: null, true, [1, 2], a string."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.strip().removesuffix("...").strip()
