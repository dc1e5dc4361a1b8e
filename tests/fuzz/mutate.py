"""Mutations of bytes, text and JSON, drawn from a generator."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**70,
    "",
    " ",
    "a",
    "\x00",
    "\ud800",
    "é测试",
    "../../../etc/passwd",
    "/dev/zero",
    "x" * 3000,
    "{{ ''.__class__.__mro__ }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "(a+)+$",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"": []},
    ["a", 1, None],
]
BYTES = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"[",
    b'"',
    b"\\",
    b"\n",
    b"\x1b[2J",
    b"9" * 400,
]
DEEPEST = 300


def nasty(draw: Random) -> Any:
    """Return a value that few readers expect."""
    if draw.random() < 0.03:
        return nested(DEEPEST)
    return copy.deepcopy(draw.choice(NASTY))


def nested(depth: int) -> Any:
    """Return lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """Change, cut, repeat or put in some bytes."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([1, 4, 30, 300]))
        kind = draw.randrange(6)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * draw.choice([2, 50]) + data[end:]
        elif kind == 3:
            data = data[:at] + draw.choice(BYTES) * draw.choice([1, 1, 200]) + data[at:]
        elif kind == 4:
            data = data[:at]
        else:
            other = draw.randrange(len(data) + 1)
            data = data[:at] + data[other : other + (end - at)] + data[end:]
    return data


def mutate_json(draw: Random, value: Any, times: int | None = None) -> Any:
    """Change some places of a JSON value: their values, names, presence."""
    value = copy.deepcopy(value)
    for _ in range(times or draw.choice([1, 1, 1, 2, 4])):
        places = _places(value)
        if not places:
            return nasty(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind <= 1:
            holder[key] = nasty(draw)
        elif kind == 2:
            del holder[key]
        elif kind == 3:
            other, name = draw.choice(places)
            if other is not holder and _is_in(other, name):
                holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, dict):
            holder[str(draw.choice(NASTY))[:40]] = holder.pop(key)
        else:
            holder.insert(key, nasty(draw))
    return value


def _is_in(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    queue = [value]
    while queue and len(found) < most:
        holder = queue.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            found += [(holder, key) for key in keys[:200]]
            queue += [holder[key] for key in keys[:200]]
    return found


def dumped(value: Any) -> bytes:
    """Return JSON; what cannot be written, as lone surrogates, in its escaped form."""
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"[" * 20_000


def mutate_file(draw: Random, data: bytes) -> bytes:
    """Mutate a JSON file: by its structure, or its bytes."""
    if draw.random() < 0.25:
        return mutate_bytes(draw, data)
    return dumped(mutate_json(draw, json.loads(data)))
