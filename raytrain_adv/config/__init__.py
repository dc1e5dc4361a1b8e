"""The job file as types. Importing this, and loading a job, imports neither torch nor ray."""

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.load import load
from raytrain_adv.config.section import Section

__all__ = ["JobConfig", "Section", "load"]
