"""Answers of a loaded model: streamed one by one, or in batches."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from raytrain_adv.data.tokens.limits import template_time
from raytrain_adv.driver.commands.use.load import Loaded
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.text import first_line, of_error, plural

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """Tokens of the answer."""
    is_whole: bool
    """Whether the model ended it; false where max_new_tokens or the model's positions did."""


class _Stop(StoppingCriteria):
    """Ends an answer between two tokens, on request."""

    def __init__(self, *is_stopped: threading.Event) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stops = any(event.is_set() for event in self.is_stopped)
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device, dtype=torch.bool)


def prompt_ids(
    loaded: Loaded, messages: Messages, thinks: bool | None, tools: Sequence[Any] | None = None
) -> list[int]:
    """Return the tokens of a conversation up to where its answer begins, by the chat template of
    the model's folder; without one, those of the last message's text. Raises JobError if the
    template refuses the conversation.
    """
    tokenizer: Any = loaded.tokenizer
    if not loaded.has_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    if loaded.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": loaded.system}, *messages]
    thinks = loaded.thinks if thinks is None else thinks
    try:
        with template_time("of a conversation"):
            text = tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
                **({} if thinks is None else {"enable_thinking": thinks}),
            )
    except JobError:
        raise
    except Exception as error:  # templates raise what they like
        roles = " -> ".join(str(message.get("role")) for message in messages)
        fix = "change the conversation: some templates take no system message, or no tools"
        what = f"the chat template of {loaded.source.folder} refuses this conversation"
        raise JobError(what, f"{roles}: {first_line(error)}", fix) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _room(loaded: Loaded, longest: int, wanted: int) -> int:
    """Return how many tokens an answer may have. Raises JobError if there is room for none."""
    config = loaded.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    room = wanted if positions is None else min(wanted, positions - longest)
    if room < 1:
        found = f"{longest:,} tokens, and the model has {positions:,} positions"
        fix = "shorten the prompt; in chat, /clear begins again"
        raise JobError("the prompt leaves no room for an answer", found, fix)
    return room


def _arguments(loaded: Loaded, sampling: Sampling, longest: int) -> dict[str, Any]:
    eos = loaded.model.generation_config.eos_token_id
    stops = {*(eos if isinstance(eos, list) else [eos]), loaded.tokenizer.eos_token_id} - {None}
    room = _room(loaded, longest, sampling.max_new_tokens)
    return {
        **sampling.arguments(),
        "max_new_tokens": room,
        "max_length": None,
        "eos_token_id": sorted(stops) or None,
        "pad_token_id": loaded.tokenizer.pad_token_id,
        "use_cache": True,
    }


def stream(
    loaded: Loaded, ids: list[int], sampling: Sampling, is_stopped: threading.Event
) -> Iterator[str]:
    """Yield an answer's text as its tokens come; `is_stopped` ends it early. Raises JobError if the
    prompt leaves no room, and TrainingError if the model cannot compute it.
    """
    arguments = _arguments(loaded, sampling, len(ids))
    untyped: Any = TextIteratorStreamer
    streamer = untyped(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    put, stops = streamer.put, arguments["eos_token_id"] or ()

    def without_stops(tokens: Any) -> None:
        """Leave out what ends an answer, which may be no special token."""
        if streamer.next_tokens_are_prompt or int(tokens) not in stops:
            put(tokens)

    streamer.put = without_stops
    failed: list[Exception] = []
    is_left = threading.Event()  # by the reader; another model's answer may continue

    def work() -> None:
        try:
            loaded.model.generate(
                input_ids=torch.tensor([ids], device=loaded.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=loaded.device),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(is_stopped, is_left)]),
                **arguments,
            )
        except Exception as error:  # noqa: BLE001 # raised in the thread that reads the stream
            failed.append(error)
            streamer.end()

    _seed(sampling)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        is_left.set()
        thread.join()
    if failed:
        raise _not_computed(loaded, failed[0])


@torch.no_grad()
def batch(loaded: Loaded, prompts: list[list[int]], sampling: Sampling) -> list[Answer]:
    """Return the answers to several prompts, computed together, padded on the left. Raises JobError
    if a prompt leaves no room, and TrainingError if the model cannot compute them.
    """
    longest = max(map(len, prompts))
    pad = int(loaded.tokenizer.pad_token_id or 0)
    rows = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    arguments = _arguments(loaded, sampling, longest)
    try:
        found = loaded.model.generate(
            input_ids=torch.tensor(rows, device=loaded.device),
            attention_mask=torch.tensor(masks, device=loaded.device),
            **arguments,
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU has no room for a batch of answers",
            f"{plural(len(prompts), 'prompt')} of up to {longest:,} tokens: {first_line(error)}",
            "give a smaller --batch-size, or max_new_tokens",
        ) from error
    answers = []
    for ids, row in zip(prompts, found[:, longest:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in arguments["eos_token_id"]), None)
        kept = row if end is None else row[:end]
        text = str(loaded.tokenizer.decode(kept, skip_special_tokens=True))
        answers.append(Answer(text, len(ids), len(kept), end is not None))
    return answers


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)


def in_batches(
    loaded: Loaded,
    prompts: list[list[int]],
    sampling: Sampling,
    size: int,
    done: Callable[[int, Answer], None],
) -> None:
    """Answer prompts, longest first so that a lack of memory shows at once; `done` gets each answer
    with its prompt's number.
    """
    _seed(sampling)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        found = batch(loaded, [prompts[number] for number in numbers], sampling)
        for number, answer in zip(numbers, found, strict=True):
            done(number, answer)


def _not_computed(loaded: Loaded, error: Exception) -> TrainingError:
    found = of_error(error)
    fix = "try --device cpu, or less with max_new_tokens; another folder of the run may load too"
    return TrainingError(f"{loaded.source.folder} gave no answer", found, fix)
