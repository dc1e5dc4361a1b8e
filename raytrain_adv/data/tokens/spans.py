"""Where answers lie in a rendered conversation, for chat templates that do not mark them."""

from collections.abc import Iterable
from functools import cache

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Message, UnusableRow
from raytrain_adv.data.tokens.page import Page, Span

_OTHER = "\ue000"
"""A character of private use: no text begins or ends with it."""


def split_by_prefixes(page: Page, messages: list[Message], text: str) -> list[Span] | None:
    """Return the answers, if each rendered beginning of the conversation begins the whole text.

    None: the template writes a message differently once more messages follow it.
    """
    spans: list[Span] = []
    for turn in _answers(messages):
        prompt = page.write(messages[:turn], asks=True)
        until = text if turn == len(messages) - 1 else page.write(messages[: turn + 1])
        if not (text.startswith(prompt) and text.startswith(until) and len(prompt) < len(until)):
            return None
        if spans and len(prompt) < spans[-1][1]:
            return None
        spans.append((len(prompt), len(until)))
    return spans


def _answers(messages: list[Message]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def longest_by_tokens(tokens: Iterable[str], text: str, at: int) -> int:
    """Return where the longest run of the first `tokens` ends that the text has at `at`."""
    for token in tokens:
        if not text.startswith(token, at):
            break
        at += len(token)
    return at


class Difference:
    """Finds answers by rendering the conversation again with one message changed.

    Where both texts differ is where that message stands, whatever else the template rewrites in
    earlier messages, such as thoughts that it removes.
    """

    def __init__(
        self, page: Page, tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str
    ) -> None:
        self.page, self.tokenizer, self.messages, self.text = page, tokenizer, messages, text
        self.place = cache(lambda turn: self._place(self.messages, turn, self.text, False))

    def answers(self) -> list[Span]:
        """Return the answers. Raises UnusableRow if one cannot be separated from its prompt."""
        spans: list[Span] = []
        for turn in _answers(self.messages):
            start, end = self._start(turn), self._end(turn)
            if not (spans[-1][1] if spans else 0) <= start < end:
                raise _inseparable(turn)
            spans.append((start, end))
        return spans

    def _start(self, turn: int) -> int:
        """Find where the beginning that generation continues ends."""
        if turn == 0:
            return len(self.page.write([], asks=True))
        before = self.messages[:turn]
        prompt = self.page.write(before, asks=True)
        _, asked = self._place(before, turn - 1, prompt, asks=True)
        after = self.place(turn - 1)[1]
        end = longest_by_tokens(self._tokens(prompt[asked:]), self.text, after)
        if end == after:
            raise _inseparable(turn)
        return end

    def _end(self, turn: int) -> int:
        if turn == len(self.messages) - 1:
            return len(self.text)
        until = self.messages[: turn + 1]
        alone = self.page.write(until)
        tail = self._tokens(alone[self._place(until, turn, alone, asks=False)[1] :])
        after = self.place(turn)[1]
        end = longest_by_tokens(tail, self.text, after)
        if end == after and tail:
            # The last answer ends with another token than earlier ones: GPT-OSS has <|return|>.
            following = self._tokens(self.text[after : self.place(turn + 1)[0]])
            added = map(str, self.tokenizer.added_tokens_decoder.values())
            if following and following[0] in {*self.tokenizer.all_special_tokens, *added}:
                return after + len(following[0])
            raise _inseparable(turn)
        return end

    def _place(self, messages: list[Message], turn: int, text: str, asks: bool) -> Span:
        """Return where a message's own words stand in the text."""
        for other in _changed(messages[turn]):
            try:
                changed = self.page.write([*messages[:turn], other, *messages[turn + 1 :]], asks)
            except UnusableRow:
                continue
            if changed != text:
                start = _same(text, changed)
                most = min(len(text), len(changed)) - start
                return start, len(text) - min(_same(text[::-1], changed[::-1]), most)
        raise UnusableRow(f"the tokenizer's chat template does not write message {turn + 1}")

    def _tokens(self, text: str) -> list[str]:
        """Split a text at the borders of its tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [text[start:end] for start, end in encoded["offset_mapping"] if end > start]


def _changed(message: Message) -> Iterable[Message]:
    """Yield the message with other words."""
    calls = message.get("tool_calls") or []
    if calls:
        function = {**calls[-1]["function"]}
        arguments = function["arguments"]
        other = {_OTHER: _OTHER} if isinstance(arguments, dict) else _OTHER
        last = {**calls[-1], "function": {**function, "arguments": other}}
        yield {**message, "tool_calls": [*calls[:-1], last]}
    yield {**message, "content": _OTHER}


def _same(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _inseparable(turn: int) -> UnusableRow:
    why = f"the tokenizer's chat template does not separate message {turn + 1} from its prompt"
    return UnusableRow(f"{why}; the template of the model's family, set by name, marks answers")
