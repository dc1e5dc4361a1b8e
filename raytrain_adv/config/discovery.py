"""Every section a job file's keys can belong to."""

import importlib

from raytrain_adv.config import sections
from raytrain_adv.config.section import Section

SECTIONS: dict[str, type[Section]] = {
    "model": sections.ModelConfig,
    "data": sections.DataConfig,
    "train": sections.TrainConfig,
    "parallel": sections.ParallelConfig,
    "output": sections.OutputConfig,
    "ray": sections.RayConfig,
}
"""JobConfig's field -> its section."""


def transform_types() -> tuple[type[Section], ...]:
    """Return every transform there is, in the order of application.

    Imported by name, because transforms are built on config and never the other way round.
    """
    found: tuple[type[Section], ...] = importlib.import_module("raytrain_adv.transforms").discover()
    return found


def section_types() -> tuple[type[Section], ...]:
    """Return the sections and the transforms."""
    return (*SECTIONS.values(), *transform_types())
