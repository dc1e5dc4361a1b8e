"""The picture of the package's floors, made from the import contract in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = {
    "cli": "the commands",
    "launch": "python -m entry point",
    "driver.commands": "chat, export, status, submit, doctor, kernels",
    "driver.sweep": "trials under Ray Tune",
    "driver.training": "Ray Train: start, watch, report",
    "driver.preflight": "probe nodes, refuse unusable ones",
    "driver.plan": "--plan, as data and as text",
    "driver.watch": "head, nodes, hangs, stops",
    "driver.cluster": "connect, place, resize",
    "driver.output": "output_dir and its lock",
    "report": "report.json, report.html",
    "export": "model, model-quantized",
    "worker": "train(): the recipe and its loop",
    "estimate": "memory, FLOPs, traffic",
    "checkpoint": "save, load, resume",
    "data": "rows, tokens, batches",
    "model": "build, shard, load weights",
    "transforms": "one file per feature",
    "kernels": "Hub kernels: find, pin, swap",
    "trial": "compare a module with its reference",
    "run": "schedule, trackers, heartbeat",
    "storage": "files: atomic, retried",
    "config": "the job file as types",
    "ops": "FP8, fake quantization, loss: math and kernels",
    "tables": "tables for terminals and reports",
    "text": "names, numbers",
    "redaction": "secrets",
    "dtensor": "sharded tensors",
    "hardware": "facts of a machine",
    "errors": "what, found, fix",
}
WIDTH, HEIGHT, GAP, MARGIN = 960, 46, 8, 16
COLORS = {"driver": "#dbe9f6", "worker": "#fde9d0", "": "#e9efe6"}


def layers() -> list[list[str]]:
    """Return the floors, top first, each with its rooms."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [one for one in tool["contracts"] if one["type"] == "layers"]
    return [
        [room.strip().strip("()").removeprefix("raytrain_adv.") for room in re.split("[|:]", floor)]
        for floor in contract["layers"]
    ]


def svg() -> str:
    """Return the picture: a row of boxes for each floor; imports only go down."""
    floors = layers()
    height = MARGIN * 2 + len(floors) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        "<title>The floors of raytrain_adv: each imports only from floors below it</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for number, rooms in enumerate(floors):
        y = MARGIN + number * (HEIGHT + GAP)
        width = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        for place, room in enumerate(rooms):
            parts += _box(room, MARGIN + place * (width + GAP), y, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(room: str, x: float, y: float, width: float) -> list[str]:
    color = COLORS.get(room.partition(".")[0], COLORS[""])
    middle = x + width / 2
    small = 12 if width > 200 else 10
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" rx="5" fill="{color}" '
        'stroke="#8a9aa8"/>',
        f'<text x="{middle:.1f}" y="{y + 19}" font-size="15" font-weight="600" fill="#1f2933">'
        f"{escape(room)}</text>",
        f'<text x="{middle:.1f}" y="{y + 36}" font-size="{small}" fill="#3e4c59">'
        f"{escape(ROOMS.get(room, ''))}</text>",
    ]
