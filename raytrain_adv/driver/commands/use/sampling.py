"""How answers are drawn: LLaMA-Factory's keys of generation, as key=value on the command line."""

from typing import Annotated, Any

from pydantic import Field

from raytrain_adv.config.section import Section
from raytrain_adv.config.sections import LARGEST, Count


class Sampling(Section):
    """How answers are drawn; the names and defaults are LLaMA-Factory's."""

    do_sample: bool = True
    """Draw each token at random by its probability; false takes the likeliest."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.95
    """Below 1 likely tokens become likelier."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] = 50
    """Draw from this many likeliest tokens; 0 means all."""
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Above 1, tokens that have appeared become less likely."""
    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""
    enable_thinking: bool | None = None
    """For templates of reasoning models: whether the model may think first; none is as in the run's
    training, or by default of the template."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Seed of the drawing; none draws differently each time."""

    def words(self) -> str:
        """Return the values that matter, for the user."""
        shown = ["temperature", "top_p", "top_k"] if self.do_sample else []
        shown += ["repetition_penalty"] if self.repetition_penalty != 1.0 else []
        shown += ["max_new_tokens", *(["seed"] if self.seed is not None else [])]
        drawn = "sampled" if self.do_sample else "the likeliest token each time"
        return f"{drawn}; " + ", ".join(f"{key} {getattr(self, key):g}" for key in shown)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' generate()."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "do_sample": self.do_sample,
            **(drawn if self.do_sample else {}),
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_new_tokens,
        }
