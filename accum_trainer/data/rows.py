"""The row formats, and which part of each is trained on.

    text                                    all of it
    prompt + completion                     the completion
    question + answer                       the answer
    instruction (+ input) + output          the output
    messages                                the assistant's turns, in the chat template
    conversations                           the same in ShareGPT's form: from and value

Numbers are text too: 42 is trained on as "42". A row becomes *spans*: pieces of text, each with
whether it is a target. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accum_trainer.data.literal import delimiter_remedy
from accum_trainer.errors import DataError

# A piece of a sample's text, and whether the loss counts it.
Span = tuple[str, bool]
ChatTemplate = Callable[..., str]

FORMATS = (
    "text; prompt + completion; question + answer; instruction (+ input) + output; "
    "messages; or conversations"
)
TEXT_COLUMNS = (
    "text",
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
)
# Format -> the columns that it needs; the first that fits is taken.
NEEDED = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
    "question": ("question", "answer"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
# ShareGPT's names of the speakers -> the chat template's roles.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def format_of(columns: Sequence[str]) -> str | None:
    """The name of the format that has these columns, or None."""
    return next((name for name, needed in NEEDED.items() if set(needed) <= set(columns)), None)


def spans_of(
    row: Mapping[str, Any], where: str, chat_template: ChatTemplate | None = None
) -> list[Span]:
    """Turn one row into its spans.

    Args:
        row: column name to value; a None value counts as absent.
        where: the row's name in errors, such as `train.jsonl row 7`.
        chat_template: `tokenizer.apply_chat_template`, needed for `messages`.

    Returns:
        The spans in order; joined, they are the sample's text.

    Raises:
        DataError: no format has these columns, a value is not text, the tokenizer has no template
            for messages, or the template refuses or rewrites them.
    """
    present = {key: value for key, value in row.items() if value is not None}
    name = format_of(list(present))
    if name is None:
        raise _no_format(row, list(present), where)
    if name == "messages":
        return _message_spans(present["messages"], where, chat_template)
    if name == "conversations":
        return _message_spans(
            _from_conversations(present["conversations"], where), where, chat_template
        )
    if name == "text":
        return [(_text(present, "text", where), True)]
    if name == "completion":
        return [
            (_text(present, "prompt", where), False),
            (_text(present, "completion", where), True),
        ]
    if name == "question":
        return [
            (_text(present, "question", where) + "\n", False),
            (_text(present, "answer", where), True),
        ]
    context = _text(present, "input", where) if "input" in present else ""
    prompt = _text(present, "instruction", where) + "\n" + (context + "\n" if context else "")
    return [(prompt, False), (_text(present, "output", where), True)]


def _no_format(row: Mapping[str, Any], present: list[str], where: str) -> DataError:
    """The error of a row that has no format, for `spans_of`."""
    formats = [needed for needed in NEEDED.values() if set(needed) <= set(row)]
    if formats:
        needed = max(formats, key=lambda needed: len(set(needed) & set(present)))
        missing = next(column for column in needed if column not in present)
        return DataError(
            f"{where}: null value in column {missing} (so is an empty cell of CSV, or an absent "
            "key of JSON); fill it in, or leave the row out"
        )
    return DataError(
        f"{where} has the columns {sorted(present)}, which make no row format; expected {FORMATS}"
        + (
            delimiter_remedy(present)
            or ". Name yours with --prompt-column q --completion-column a, or --text-column t"
        )
    )


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {column}={value!r} is a {type(value).__name__}, not text")
    return str(value)


def _from_conversations(turns: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's turns, {from, value}, as messages."""
    if not isinstance(turns, (list, tuple)) or not all(
        isinstance(t, Mapping) and {"from", "value"} <= set(t) for t in turns
    ):
        raise DataError(f"{where}: conversations is not a list of {{from, value}} items")
    unknown = sorted({str(turn["from"]) for turn in turns} - set(ROLES))
    if unknown:
        raise DataError(
            f"{where}: conversations are from {', '.join(unknown)}, and known are "
            f"{', '.join(ROLES)}; give rows of messages with the roles of the chat template"
        )
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _message_spans(messages: Any, where: str, chat_template: ChatTemplate | None) -> list[Span]:
    """Mark the text that each assistant turn adds to the rendered conversation.

    The conversation is rendered twice per turn, before it (with the generation prompt) and after
    it; the difference is the turn. The template need not mark generations, but it must not rewrite
    earlier turns.
    """
    if chat_template is None:
        raise DataError(
            f"{where} has messages, but the tokenizer has no chat template; give one with "
            "chat_template, use a model with a chat template, or rows of prompt + completion"
        )
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(m, Mapping) and "role" in m for m in messages
    ):
        raise DataError(f"{where}: messages is not a list of {{role, content}} items")
    turns = [dict(m) for m in messages]
    spans: list[Span] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            before = chat_template(turns[:index], tokenize=False, add_generation_prompt=True)
            after = chat_template(turns[: index + 1], tokenize=False)
        except Exception as error:  # of any type: templates and Jinja raise their own
            raise DataError(
                f"{where}: the chat template refuses the conversation: {error}"
            ) from None
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns, so the assistant's part "
                "cannot be separated; give rows of prompt + completion instead"
            )
        spans += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return spans
