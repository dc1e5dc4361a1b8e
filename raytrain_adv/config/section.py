"""The base class of every group of job keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.documented import Documented

if TYPE_CHECKING:
    from raytrain_adv.config.job import JobConfig


def unknown_user(value: Any) -> str:
    """Return which user in a path's ~user this machine does not have; empty if it has all."""
    parts = value.split(",") if isinstance(value, str) else ()
    paths = (os.path.expanduser(part.strip()) for part in parts)
    unknown = next((path for path in paths if path.startswith("~")), "")
    return f"this machine has no user {unknown.partition('/')[0][1:]}" if unknown else ""


def expand(value: Any) -> Any:
    """Return a path, a list of them, or a comma-separated one, with ~ and ~user replaced. Raises
    ValueError if there is no such user.
    """
    if isinstance(value, list):
        return [expand(one) for one in value]
    if reason := unknown_user(value):
        raise ValueError(reason)
    if "~" not in value:
        return value
    return ",".join(os.path.expanduser(part.strip()) for part in value.split(","))


Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
PathText = Annotated[Text, AfterValidator(expand)]
"""A path or a URI."""
Names = Text | Annotated[list[Text], Field(min_length=1)]


class Section(Documented, BaseModel):
    """A frozen group of job keys. The string under a field documents it, in the schema too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    feature: ClassVar[str] = ""
    """The feature's title in the compatibility matrix; empty if these keys are not a feature."""
    name: ClassVar[str] = ""
    """A transform's name in plans and reports."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Other names by which `explain` knows the feature."""
    tried_with: ClassVar[dict[str, Any]] = {}
    """Keys and values with which tests enable the feature in a small model."""
    needs_gpu: ClassVar[bool] = False
    """Whether it, and so its tests, run on GPUs only."""
    excludes: ClassVar[dict[str, str]] = {}
    """Keys of other sections that cannot be used with these -> why."""
    careful: ClassVar[dict[str, str]] = {}
    """Keys of other sections that need care with these -> which care."""
    needs: ClassVar[dict[str, str]] = {}
    """Keys of a feature that these require -> why."""

    converts: ClassVar[str] = ""
    """Suffix of a second, converted model folder that `export` writes; empty if there is none."""

    @property
    def enabled(self) -> bool:
        """Whether the job uses these keys; a transform may be off."""
        return True

    def serves(self, key: str, job: JobConfig) -> bool:
        """Whether the job uses this key for something else while this section is off."""
        return False

    def contradictions(self) -> Iterable[Problem]:
        """Find keys of this section that contradict each other; each Problem names them all."""
        return ()

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Find values of other sections that conflict with this enabled one; name both keys."""
        return ()

    def without_effect(self, job: JobConfig) -> Iterable[str]:
        """Return a sentence for each key of this section that another key makes ineffective."""
        return ()

    def check_length(self, total_steps: int) -> None:
        """Raise a JobError that names a key which does not fit the number of optimizer steps."""

    def is_changed(self, key: str) -> bool:
        """Whether the job gives this key a value other than its default."""
        return key in self.model_fields_set and getattr(self, key) != self.default(key)

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Explain why a value is refused; empty if the list of choices explains enough."""
        return ""

    @classmethod
    def default(cls, key: str) -> Any:
        """Return the default of a key; None for a required key."""
        field = cls.model_fields[key]
        return None if field.is_required() else field.get_default(call_default_factory=True)
