"""Rows of finetuning sets, in any of the shapes people keep them in, as samples.

Known shapes: `prompt` with `response` or `completion`; Dolly and Alpaca (`instruction`, `context` or `input`,
`response` or `output`); `messages`; ShareGPT (`conversations` of `from` and `value`); HC3 (`question`,
`chatgpt_answers`); HH-RLHF (`chosen`); trees of OASST; plain `text`. They are rendered by `mpt.prompts`, as the server
renders prompts, so text never becomes a control token.
"""

import itertools
import re
from typing import Any, Literal, NamedTuple

from mpt.chat_template import ChatTemplate
from mpt.errors import UserError
from mpt.prompts import INSTRUCT_PREAMBLE, INSTRUCT_TURN, Message, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from training.run import Learn

Shape = Literal["text", "messages", "conversations", "tree", "transcript", "prompt", "instruction", "answers"]
# What rows of a shape are made for: several turns for ChatML, a question and its answer for Dolly's template.
STYLES: dict[Shape, PromptStyle] = {
    "text": "none", "messages": "chatml", "conversations": "chatml", "tree": "chatml", "transcript": "chatml",
    "prompt": "instruct", "instruction": "instruct", "answers": "instruct",
}  # fmt: skip
_CONVERSATIONS = {"messages", "conversations", "prompt", "instruction", "question", "chosen"}
_RESPONSES = ("response", "completion", "output")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class Sample(NamedTuple):
    """One document or conversation: its tokens, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def sample_of(
    row: Any,
    tokenizer: Tokenizer,
    style: PromptStyle,
    learn: Learn = "responses",
    template: ChatTemplate | None = None,
) -> Sample:
    """A row as tokens. learn: what the assistant says and the token that ends it, or everything.

    template: of style `template`. Raises UserError for a row of no known shape, with its keys.
    """
    if isinstance(row, str):
        raise UserError("it is not JSON")
    if not isinstance(row, dict):
        raise UserError(f"a row is a {type(row).__name__}; an object is needed")
    if shape(row) == "text":
        sample = text_sample([*tokenizer.encode(row["text"]), tokenizer.eos_id])
    else:
        messages = conversation(row)
        if style == "none":
            sample = _plain(messages, tokenizer)
        else:
            sample = Sample(*encode_training(tokenizer, style, messages, template))
    return sample if learn == "responses" else Sample(sample.ids, [True] * len(sample.ids))


def text_sample(ids: list[int]) -> Sample:
    return Sample(ids, [True] * len(ids))


def shape(row: dict[str, Any]) -> Shape | None:
    """How a row keeps what was said; None for a row of no known shape."""
    # Copies of Alpaca carry a `text` beside the fields it was made from: only a row of nothing else is plain text.
    if isinstance(row.get("text"), str) and not row.keys() & _CONVERSATIONS:
        return "text"
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(row.get("conversations"), list):
        return "conversations"
    if isinstance(row.get("prompt"), dict):
        return "tree"
    if isinstance(row.get("chosen"), str):
        return "transcript"
    has_response = any(isinstance(row.get(key), str) for key in _RESPONSES)
    if isinstance(row.get("prompt"), str) and has_response:
        return "prompt"
    if isinstance(row.get("instruction"), str) and has_response:
        return "instruction"
    if isinstance(row.get("question"), str) and isinstance(row.get("chatgpt_answers"), list):
        return "answers"
    return None


def conversation(row: dict[str, Any]) -> list[Message]:
    """A row's turns: at least two, the assistant's last, no role twice in a row. Raises UserError."""
    found = shape(row)
    if found == "messages":
        return _checked([_message(message) for message in row["messages"]])
    if found == "conversations":
        return _checked(_trimmed([_sharegpt(message) for message in row["conversations"]]))
    if found == "tree":
        return _checked(_trimmed(_best_path(row["prompt"])))
    if found == "transcript":
        return _checked(_trimmed(_transcript(row["chosen"])))
    response = next((row[key] for key in _RESPONSES if isinstance(row.get(key), str)), "")
    if found == "prompt":
        return _exchange(_instruction(row["prompt"]), response)
    if found == "instruction":
        more = row.get("context") or row.get("input") or ""
        return _exchange(row["instruction"] + (f"\n{more}" if more else ""), response)
    if found == "answers":
        answers = [*row["chatgpt_answers"], *row.get("human_answers", [])]
        return _exchange(row["question"], next((answer for answer in answers if answer), ""))
    raise UserError(
        f"a row has the keys {', '.join(map(str, row))}; needed: prompt and response, instruction and response, "
        "messages, conversations, or text"
    )


def _exchange(question: str, answer: str) -> list[Message]:
    if not question.strip() or not answer.strip():
        raise UserError("prompt or response is empty")
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _checked(messages: list[Message]) -> list[Message]:
    """llm-foundry's rules for a conversation."""
    if len(messages) < 2:
        raise UserError(f"a conversation has {len(messages)} messages; it needs a question and an answer")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    for before, after in itertools.pairwise(messages):
        if before["role"] == after["role"]:
            raise UserError(f"two messages of the {after['role']} follow each other")
    return messages


def _trimmed(messages: list[Message]) -> list[Message]:
    """Without what comes before the first question and after the last answer, as scraped conversations have it."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    while messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    return messages


def _message(value: Any) -> Message:
    if isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
        return Message(role=value["role"], content=value["content"])
    raise UserError("a message needs the texts `role` and `content`")


def _sharegpt(value: Any) -> Message:
    if isinstance(value, dict) and isinstance(value.get("value"), str) and value.get("from") in _SHAREGPT_ROLES:
        return Message(role=_SHAREGPT_ROLES[value["from"]], content=value["value"])
    raise UserError(f"a turn needs the text `value` and `from`, one of {', '.join(_SHAREGPT_ROLES)}")


def _best_path(node: dict[str, Any]) -> list[Message]:
    """An OASST tree's conversation: at every branch the reply its readers ranked best."""
    messages = []
    branch: dict[str, Any] | None = node
    while branch is not None:
        if not isinstance(branch.get("text"), str):
            raise UserError("a message of the tree has no text")
        role = "user" if branch.get("role") == "prompter" else "assistant"
        messages.append(Message(role=role, content=branch["text"]))
        replies = [reply for reply in branch.get("replies", []) if not reply.get("deleted")]
        branch = min(replies, key=_rank) if replies else None
    return messages


def _rank(reply: dict[str, Any]) -> float:
    return reply["rank"] if isinstance(reply.get("rank"), int) else float("inf")


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's "Human: ... Assistant: ..." as turns."""
    _, *parts = _HH_TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=speakers[who], content=said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _plain(messages: list[Message], tokenizer: Tokenizer) -> Sample:
    """Without a template: an answer follows its question as it is, and end-of-text follows the answer."""
    ids: list[int] = []
    learned: list[bool] = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        part = tokenizer.encode(message["content"]) + ([tokenizer.eos_id] if is_answer else [])
        ids += part
        learned += [is_answer] * len(part)
    return Sample(ids, learned)


def _instruction(prompt: str) -> str:
    """What was asked: a prompt that already is in Dolly's template, as dolly_hhrlhf's are, is taken out of it."""
    head, tail = (INSTRUCT_PREAMBLE + INSTRUCT_TURN).split("{instruction}")
    if prompt.startswith(head) and prompt.endswith(tail):
        return prompt[len(head) : -len(tail)]
    return prompt
