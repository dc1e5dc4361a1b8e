"""The shape every group of job keys shares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from raytrain_adv.config.problems import Problem

if TYPE_CHECKING:
    from raytrain_adv.config.job import JobConfig


class Section(BaseModel):
    """A frozen group of keys of the job file. The string under a field is its documentation and its
    schema's."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        strict=False,
        allow_inf_nan=False,
        protected_namespaces=(),
        arbitrary_types_allowed=False,
    )

    feature: ClassVar[str] = ""
    """What the compatibility matrix calls what these keys turn on; empty where they are none."""
    tried_with: ClassVar[dict[str, Any]] = {}
    """Keys and values by which tests turn the feature on, in a small model."""
    needs_gpu: ClassVar[bool] = False
    """Whether it runs on GPUs only, so that its tests do too."""
    excludes: ClassVar[dict[str, str]] = {}
    """Keys that turn on what cannot be on together with these keys, and why."""
    careful: ClassVar[dict[str, str]] = {}
    """Keys that turn on what needs care together with these keys, and which."""

    needs: ClassVar[dict[str, str]] = {}
    """Keys of what has to be on together with these keys, and why."""

    converts: ClassVar[str] = ""
    """Suffix of a second model folder that `export` writes, converted from the trained one; empty
    if there is none."""

    @property
    def enabled(self) -> bool:
        """Whether the job uses these keys at all; a transform may be off."""
        return True

    def serves(self, key: str, job: JobConfig) -> bool:
        """Whether other keys of the job use a key of these though these are off."""
        return False

    def contradictions(self) -> Iterable[Problem]:
        """Find keys of this section that cannot stand together; each Problem names them all.

        Rules between the keys of several sections are in config/rules.py; those of a feature with
        other keys in its `excludes`, and in `conflicts` where it takes more than being on.
        """
        return ()

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Find keys of other sections that do not go with these, which are on; each Problem names
        both.
        """
        return ()

    def without_effect(self, job: JobConfig) -> Iterable[str]:
        """Return a sentence for each key of these, which are in use, that other keys of the job
        leave without effect.
        """
        return ()

    def check_length(self, total_steps: int) -> None:
        """Raise if the keys do not fit a run of so many optimizer steps.

        Raises:
            JobError: naming the key and what would fit.
        """

    def asked_for(self, key: str) -> bool:
        """Whether the job gives this key a value other than its default."""
        return key in self.model_fields_set and getattr(self, key) != self.default(key)

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Say more of a value that a key does not accept; empty where its choices say enough."""
        return ""

    @classmethod
    def default(cls, key: str) -> Any:
        """Return the value of a key that the job leaves out; null for a required key."""
        field = cls.model_fields[key]
        return None if field.is_required() else field.get_default(call_default_factory=True)
