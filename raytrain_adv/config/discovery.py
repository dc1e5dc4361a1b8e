"""List the sections and transforms that own the keys of a job file."""

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
    """Return every transform, in the order of application.

    Imported by name, because transforms import config and config must not import transforms.
    """
    found: tuple[type[Section], ...] = importlib.import_module("raytrain_adv.transforms").discover()
    return found


def section_types() -> tuple[type[Section], ...]:
    """Return the sections and the transforms."""
    return (*SECTIONS.values(), *transform_types())
