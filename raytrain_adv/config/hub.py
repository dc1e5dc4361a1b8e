"""The job keys of uploads to the Hugging Face Hub, by transformers' and LLaMA-Factory's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.section import Section, Text

if TYPE_CHECKING:
    from raytrain_adv.config.job import JobConfig

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


class HubConfig(Section):
    """Where the finished model is uploaded."""

    push_to_hub: bool = False
    """Upload the exported folders, each to a repository of its own, at the end of the run. The
    token is HF_TOKEN of the driver's environment; a failed upload is repeated, then reported."""
    hub_model_id: Annotated[str, Field(pattern=rf"^({NAME}/)?{NAME}$")] | None = None
    """Repository of output_dir/model, as owner/name; null means the run's name, and without owner
    it is the token's. A converted model is uploaded to the same name with its folder's suffix."""
    hub_private_repo: bool = True
    """Create private repositories, and refuse a public one that is there; false makes new ones
    public."""
    hub_strategy: Literal["end"] = "end"
    """When to upload: at the end of the run."""
    hub_revision: Text | None = None
    """Branch to upload to, created if it is not there; null means main."""

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Explain why checkpoints are not uploaded."""
        if key == "hub_strategy" and value in ("every_save", "checkpoint", "all_checkpoints"):
            return "checkpoints are sharded, to continue from; the model is written at the end"
        return ""

    def contradictions(self) -> Iterable[Problem]:
        """Find keys that do nothing without an upload."""
        for key in type(self).model_fields:
            if key != "push_to_hub" and self.is_changed(key) and not self.push_to_hub:
                fix = f"set push_to_hub: true, or delete {key}"
                yield Problem("nothing is uploaded", fix, f"{key} and push_to_hub")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Find that there would be nothing to upload."""
        if self.push_to_hub and not job.output.export_model:
            text = "there would be no model to upload"
            yield Problem(text, "set one of them to false", "push_to_hub and export_model")
