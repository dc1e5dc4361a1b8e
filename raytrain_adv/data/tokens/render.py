"""From a conversation to stretches of text that are, or are not, the assistant's."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Conversation
from raytrain_adv.data.tokens.own_template import OwnTemplate
from raytrain_adv.data.tokens.page import Page, Piece, pieces, with_system
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.errors import JobError

Renderer = Callable[[Conversation], list[Piece]]


def renderer(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    default_system: str | None,
    thinks: bool | None = True,
    drops_thoughts: bool = False,
) -> Renderer:
    """Return the function that renders conversations with a template; None: the tokenizer's own.

    `default_system` is the system message of conversations without one; None: the template's.
    `thinks` and `drops_thoughts` are those of `Template.write`.
    """
    if template is None:
        return OwnTemplate(tokenizer, _own(tokenizer), default_system, thinks)
    source = find_template(template).write(thinks, drops_thoughts)

    def render(conversation: Conversation) -> list[Piece]:
        messages = with_system(conversation.messages, default_system)
        text, spans = Page(tokenizer, source, conversation.tools).marked(messages)
        return pieces(text, spans)

    return render


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template. Raises JobError if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name, as some model folders have them
        template = template.get("default")
    if not isinstance(template, str):
        what = "The tokenizer has no default chat template"
        raise JobError(what, str(template)[:80], "set template in the job")
    return template
