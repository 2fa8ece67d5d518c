"""Rows of finetuning sets, in any of the shapes people keep them in, as samples.

Known shapes: a question with its answer, under any of the usual pairs of keys (`prompt` and `response`, Dolly's and
Alpaca's `instruction`, `context` or `input`, `output`); `messages`; ShareGPT's `conversations`; `prompt` and
`completion` of messages; HC3 (`question`, `chatgpt_answers`); HH-RLHF (`chosen`); trees of OASST; `turns` of tokens, as
LLM Foundry stores them; plain `text`. They are rendered by `mpt.prompts`, as the server renders prompts, so text never
becomes a control token.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from mpt.chat_template import ChatTemplate
from mpt.errors import UserError
from mpt.prompts import INSTRUCT_PREAMBLE, INSTRUCT_TURN, Message, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from mpt.tools import as_text
from training.data import columns as columns_of
from training.data import messages
from training.data.files import Document, Unreadable
from training.data.messages import Conversation, text_of
from training.run import Learn, prompt_limit

# What rows of a shape are made for: several turns for ChatML, a question and its answer for Dolly's template.
_STYLES: dict[str, PromptStyle] = {
    "text": "none", "turns": "none", "messages": "chatml", "conversations": "chatml", "tree": "chatml",
    "transcript": "chatml", "prompt of messages": "chatml",
}  # fmt: skip
_CONVERSATIONS = ("messages", "conversations", "conversation")
# The keys of a question and of its answer, the more telling ones first.
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "user", "human")
_RESPONSES = ("response", "completion", "output", "answer", "assistant", "chosen")
_BESIDE = {"instruction": ("context", "input"), "question": ("context",), "query": ("context",)}  # what it is about
_SYSTEM = ("system", "system_prompt")
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
    *,
    learn_prompts: str = "none",
    columns: Mapping[str, str] | None = None,
) -> Sample:
    """A row as tokens. learn: of a conversation every response with the token that ends it, the last one, or all.

    template: of style `template`. learn_prompts: as `Run` has it. columns: which keys hold what. Raises UserError for
    a row of no known shape, with its keys.
    """
    if isinstance(row, Document):
        return text_sample([*tokenizer.encode(row.text), tokenizer.eos_id])
    row = _keyed(row, columns)
    kind = shape(row)
    if kind == "text":
        return text_sample([*tokenizer.encode(row["text"]), tokenizer.eos_id])
    if kind == "turns":
        return _chosen(_of_tokens(row["turns"], tokenizer), learn, learn_prompts)
    talk = read(row)
    if style == "none":
        sample = _plain(as_text(talk.messages, talk.tools), tokenizer)
    else:
        sample = Sample(*encode_training(tokenizer, style, talk.messages, template, tools=talk.tools))
    return _chosen(_without(sample, talk) if talk.unlearned else sample, learn, learn_prompts)


def text_sample(ids: list[int]) -> Sample:
    return Sample(ids, [True] * len(ids))


def style_of(row: Any, columns: Mapping[str, str] | None = None) -> tuple[PromptStyle, str] | None:
    """The prompt style that a row is made for, and what shows it; None for a row of no known shape."""
    if isinstance(row, Document):
        return "none", "is plain text"
    kind = shape(_keyed(row, columns)) if isinstance(row, dict) else None
    if kind is None:
        return None
    shown = {"text": "plain text", "tree": "a tree of messages", "transcript": "a transcript", "turns": "tokens"}
    return _STYLES.get(kind, "instruct"), f"has {shown.get(kind, f'`{kind}`')}"


def shape(row: Mapping[str, Any]) -> str | None:
    """How a row keeps what was said: the key of its question, or a word; None for a row of no known shape."""
    for key in _CONVERSATIONS:
        if isinstance(row.get(key), list):
            return "messages" if key == "messages" else "conversations"
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "input_ids" in turn for turn in turns):
        return "turns"
    # Copies of Alpaca carry a `text` beside the fields it was made from: only a row of nothing else is plain text.
    small = _small(row)
    has_more = bool(small.keys() & {"prompt", "instruction", "question", "chosen"}) or _pair(small) is not None
    if isinstance(row.get("text"), str) and not has_more:
        return "text"
    if isinstance(row.get("prompt"), dict) and row["prompt"].keys() & {"text", "replies"}:
        return "tree"
    if isinstance(row.get("prompt"), list):
        return "prompt of messages"
    if isinstance(row.get("chosen"), list):
        return "messages"
    if isinstance(row.get("chosen"), str) and _HH_TURN.search(row["chosen"]):
        return "transcript"
    if isinstance(row.get("chatgpt_answers"), list) and "question" in row:
        return "answers"
    pair = _pair(small)
    return None if pair is None else pair[0]


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """A row's turns, as `read` finds them."""
    return read(row).messages


def read(row: Mapping[str, Any]) -> Conversation:
    """What a row keeps: at least two turns, the assistant's last, no role twice in a row. Raises UserError."""
    found = shape(row)
    tools, system = row.get("tools") or row.get("functions"), next((row[key] for key in _SYSTEM if row.get(key)), None)
    if found == "messages":
        return messages.read(row["messages"] if "messages" in row else row["chosen"], tools, system)
    if found == "conversations":
        turns = next(row[key] for key in _CONVERSATIONS if isinstance(row.get(key), list))
        return messages.read(turns, tools, system, is_trimmed=True)
    if found == "prompt of messages":
        return messages.read([*row["prompt"], *_answers_to(row)], tools, system)
    if found == "tree":
        return messages.read(_best_path(row["prompt"]), is_trimmed=True)
    if found == "transcript":
        return messages.read(_transcript(row["chosen"]), is_trimmed=True)
    if found == "answers":
        answers = [*row["chatgpt_answers"], *row.get("human_answers", [])]
        return _exchange(row["question"], next((answer for answer in answers if answer), ""))
    if found is not None:
        return _exchange(*_question_and_answer(row), tools, system)
    if "text" in row:
        text_of(row["text"], "`text`")  # which says what it is instead
    raise UserError(
        f"a row has the keys {', '.join(map(str, row))}; needed: prompt and response, instruction and output, question "
        "and answer, messages, conversations, or text; --columns prompt=KEY,response=KEY says which keys hold what"
    )


def _keyed(row: Any, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """A row that is an object, under the names known here. Raises UserError."""
    if isinstance(row, Unreadable):
        raise UserError(row.reason)
    if not isinstance(row, dict):
        raise UserError(f"a row is a {type(row).__name__}; an object is needed")
    return columns_of.apply(columns, row) if columns else row


def _small(row: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a row by their names in small letters, as tables have them in any case; the first of two."""
    return {str(key).strip().lower(): key for key in reversed(list(row))}


def _pair(keys: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of a question's key and of its answer's, of the keys of a row in small letters."""
    prompt = next((name for name in _PROMPTS if name in keys), None)
    response = next((name for name in _RESPONSES if name in keys), None)
    return None if prompt is None or response is None else (prompt, response)


def _question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    keys = _small(row)
    pair = _pair(keys)
    assert pair is not None, row.keys()
    prompt, response = pair
    question = text_of(row[keys[prompt]], f"`{keys[prompt]}`")
    beside = next((row[keys[name]] for name in _BESIDE.get(prompt, ()) if name in keys and row[keys[name]]), "")
    if beside:
        question += f"\n{text_of(beside, 'what the question is about')}"
    return _instruction(question), text_of(row[keys[response]], f"`{keys[response]}`")


def _exchange(question: str, answer: str, tools: Any = None, system: Any = None) -> Conversation:
    asked, said = Message(role="user", content=question), Message(role="assistant", content=answer)
    return messages.read([asked, said], tools, system)


def _answers_to(row: Mapping[str, Any]) -> list[Any]:
    """The turns behind a prompt of messages: messages themselves, or the text of one."""
    found = next((row[key] for key in _RESPONSES if row.get(key)), None)
    if isinstance(found, list):
        return found
    return [Message(role="assistant", content=text_of(found, "the response"))]


def _best_path(node: dict[str, Any]) -> list[Message]:
    """An OASST tree's conversation: at every branch the reply its readers ranked best."""
    path = []
    branch: dict[str, Any] | None = node
    while branch is not None:
        if not isinstance(branch.get("text"), str):
            raise UserError("a message of the tree has no text")
        role = "user" if branch.get("role") == "prompter" else "assistant"
        path.append(Message(role=role, content=branch["text"]))
        replies = [reply for reply in branch.get("replies", []) if not reply.get("deleted")]
        branch = min(replies, key=_rank) if replies else None
    return path


def _rank(reply: dict[str, Any]) -> float:
    return reply["rank"] if isinstance(reply.get("rank"), int) else float("inf")


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's "Human: ... Assistant: ..." as turns."""
    _, *parts = _HH_TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=speakers[who], content=said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _plain(turns: Sequence[Message], tokenizer: Tokenizer) -> Sample:
    """Without a template: an answer follows its question as it is, and end-of-text follows the answer."""
    ids: list[int] = []
    learned: list[bool] = []
    for message in turns:
        is_answer = message["role"] == "assistant"
        part = tokenizer.encode(message["content"]) + ([tokenizer.eos_id] if is_answer else [])
        ids += part
        learned += [is_answer] * len(part)
    return Sample(ids, learned)


def _of_tokens(turns: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Sample:
    """What LLM Foundry tokenized: each turn's context and its target; end-of-text ends the last where it is missing."""
    ids: list[int] = []
    learned: list[bool] = []
    for turn in turns:
        context, target = (list(map(int, turn.get(key) or ())) for key in ("input_ids", "labels"))
        if not context or not target:
            raise UserError("a turn has no `input_ids` or no `labels`")
        ids += [*context, *target]
        learned += [False] * len(context) + [True] * len(target)
    if ids and ids[-1] != tokenizer.eos_id:
        ids, learned = [*ids, tokenizer.eos_id], [*learned, True]
    if max(ids, default=0) >= tokenizer.vocab_size or min(ids, default=0) < 0:
        raise UserError(f"it holds token {max(ids)}, the tokenizer has {tokenizer.vocab_size}")
    return Sample(ids, learned)


def _instruction(prompt: str) -> str:
    """What was asked: a prompt that already is in Dolly's template, as dolly_hhrlhf's are, is taken out of it."""
    head, tail = (INSTRUCT_PREAMBLE + INSTRUCT_TURN).split("{instruction}")
    if prompt.startswith(head) and prompt.endswith(tail):
        return prompt[len(head) : -len(tail)]
    return prompt


# -- what is learned -----------------------------------------------------------------------------------------------


def _spans(learned: Sequence[bool]) -> Iterator[tuple[bool, int, int]]:
    """Runs of tokens: whether a run is a response, where it begins and where it ends."""
    start = 0
    for is_response, run in groupby(learned):
        end = start + sum(1 for _ in run)
        yield is_response, start, end
        start = end


def _chosen(sample: Sample, learn: Learn, learn_prompts: str) -> Sample:
    """With other tokens learned than every response. A prompt is what stands before a response, template included."""
    if learn == "responses" and learn_prompts == "none":
        return sample
    if learn == "all":
        return Sample(sample.ids, [True] * len(sample.ids))
    least = prompt_limit(learn_prompts)
    spans = list(_spans(sample.learned))
    last = max((n for n, span in enumerate(spans) if span[0]), default=-1)
    learned: list[bool] = []
    for n, (is_response, start, end) in enumerate(spans):
        is_prompt = not is_response and n < last and end - start >= least
        learned += [is_prompt or (is_response and (learn == "responses" or n == last))] * (end - start)
    return Sample(sample.ids, learned)


def _without(sample: Sample, talk: Conversation) -> Sample:
    """Without the responses that the row marks as not to be learned."""
    spans = list(_spans(sample.learned))
    responses = [n for n, span in enumerate(spans) if span[0]]
    if len(responses) != sum(message["role"] == "assistant" for message in talk.messages):
        raise UserError("its `weight`s cannot be followed: the template does not keep the responses apart")
    dropped = {responses[n] for n in talk.unlearned}
    learned: list[bool] = []
    for n, (is_response, start, end) in enumerate(spans):
        learned += [is_response and n not in dropped] * (end - start)
    return Sample(sample.ids, learned)
