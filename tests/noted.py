"""What the driver notes of a run that the tests have made without one."""

from pathlib import Path

from raytrain_adv.config import JobConfig
from raytrain_adv.driver.output.output_dir import Output, Replaced, storage_path


def note_done(job: JobConfig) -> None:
    """Write run.json, as of a run that has come to its end."""
    folder = Path(job.output.output_dir)
    folder.mkdir(exist_ok=True)
    replaced = Replaced(folder, (), [], None)
    Output(folder, storage_path(job), "local", False, False, 1, replaced).note(job, "done", 1)
