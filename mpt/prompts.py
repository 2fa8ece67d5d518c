"""Messages to token ids, one way for serving and for training.

A prompt is built as ids: control tokens are put in by this file, and content is encoded with control tokens switched
off, so `<|im_end|>` inside a message is plain text to the model.

Styles, each as its published checkpoints were trained:
- `chatml` (mpt-7b-chat, mpt-30b-chat, mpt-7b-8k-chat, mpt-tiny-chat): every turn is
  `<|im_start|>role\\ncontent<|im_end|>\\n`, the system turn closed like the others, then one assistant header. So
  llm-foundry does it; the template in mpt-7b-chat's repository left the system turn open and repeated the header.
- `instruct` (mpt-7b-instruct, mpt-30b-instruct, mpt-tiny-instruct): Dolly's template with its blank lines, each
  response ended by end-of-text. Several turns repeat the instruction and response blocks under one preamble. A system
  message goes before the next instruction, joined by a newline as Dolly joins its contexts.
- `none` (base models, StoryWriter): no messages, only text to continue.
- `template` (other people's checkpoints): the checkpoint's own Jinja template, `mpt/chat_template.py`.

Tools, calls and their results are text in the first two (`mpt/tools.py`), and in templates that know no tools.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

from mpt.chat_template import ChatTemplate, read_source
from mpt.checkpoint_text import find_template, token_names
from mpt.errors import UserError
from mpt.tokenizer import CHATML_END, CHATML_START, Tokenizer
from mpt.tools import Call, Tool, as_text

PromptStyle = Literal["none", "instruct", "chatml", "template"]
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)


class Message(TypedDict):
    """One turn. role: system, developer (the same to these models), user, assistant or tool."""

    role: str
    content: str
    calls: NotRequired[tuple[Call, ...]]  # of an assistant's, behind its content
    call_id: NotRequired[str]  # of a tool's: the call whose result the content is


ROLES = ("system", "developer", "user", "assistant", "tool")

# Source: Databricks Dolly and all rows of mosaicml/dolly_hhrlhf. mpt-7b-instruct's card shows it without the blank
# lines; its training data and its demo have them.
INSTRUCT_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
INSTRUCT_TURN = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCT_TEMPLATE = INSTRUCT_PREAMBLE + INSTRUCT_TURN

# What the published chat models were shown with. Sources: FastChat's template `mpt`; discussions of mpt-30b-chat.
MPT_7B_CHAT_SYSTEM = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, but will refuse to do anything that could be considered "
    "harmful to the user.\n"
    "- You are more than just an information source, you are also able to write poetry, short stories, and make jokes."
)
MPT_30B_CHAT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def encode_instruct(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """The ids of one instruction in Dolly's template, ready for the response."""
    return tokenizer.encode(INSTRUCT_TEMPLATE.format(instruction=instruction))


def encode_chat(
    tokenizer: Tokenizer,
    style: PromptStyle,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    system_default: str | None = None,
    template: ChatTemplate | None = None,
    *,
    tools: Sequence[Tool] = (),
    continue_final_message: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation, up to where the assistant speaks next.

    system_default: the system message of a conversation that brings none, not even an empty one; a template has a
    default of its own, or none.
    template: of style `template`; template_arguments: variables for it. continue_final_message: the last message is
    the beginning of the answer. Raises UserError for an unknown role, no messages, a style without chat, an order of
    roles the style cannot express, or arguments where there is no template.
    """
    _check(style, messages)
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise UserError(f"the last message is to be continued, and its role is `{messages[-1]['role']}`, not assistant")
    if style == "template":
        template = _given(template)
        told, native = _told(template, messages, tools)
        return template.encode(
            told, add_generation_prompt, continue_final_message, tools=native, arguments=template_arguments or {}
        )
    if template_arguments:
        names = ", ".join(f"`{name[:40]}`" for name in template_arguments)
        raise UserError(f"the prompt style `{style}` has no template that could read {names}; leave it out")
    if system_default is not None and not any(message["role"] in ("system", "developer") for message in messages):
        messages = [Message(role="system", content=system_default), *messages]
    plain = as_text(messages, tools)
    if continue_final_message:
        before = _render(tokenizer, style, plain[:-1], True)[0]
        return [*before, *tokenizer.encode(plain[-1]["content"])]
    return _render(tokenizer, style, plain, add_generation_prompt)[0]


def encode_training(
    tokenizer: Tokenizer,
    style: PromptStyle,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    *,
    tools: Sequence[Tool] = (),
) -> tuple[list[int], list[bool]]:
    """The ids of a finished conversation and, for each, whether it is learned.

    Learned is what the assistant says, calls included, and the token that ends it. Up to each response the ids equal
    `encode_chat` of the messages before it, with the same tools. Raises UserError as `encode_chat` does.
    """
    _check(style, messages)
    if style == "template":
        template = _given(template)
        told, native = _told(template, messages, tools)
        return template.encode_training(told, tools=native)
    return _render(tokenizer, style, as_text(messages, tools), add_generation_prompt=False)


class PromptFormat(NamedTuple):
    """How a checkpoint is talked to."""

    style: PromptStyle
    template: ChatTemplate | None = None  # of style `template`


def open_format(folder: Path, style: PromptStyle, tokenizer: Tokenizer, file: Path | None = None) -> PromptFormat:
    """A style, with the template compiled where it is `template`: the one in `file`, else the folder's own.

    Raises UserError for a template that is not there, DamagedFile for one that cannot be used.
    """
    if style != "template":
        return PromptFormat(style)
    names = token_names(folder)
    if file is not None:
        return PromptFormat(style, ChatTemplate(read_source(file), f"`{file}`", tokenizer, names))
    found = find_template(folder)
    if found is None:
        raise UserError(f"`{folder}` has no chat template; give one with --chat-template FILE")
    return PromptFormat(style, ChatTemplate(*found, tokenizer, names))


def _given(template: ChatTemplate | None) -> ChatTemplate:
    assert template is not None, "whoever chooses style `template` has the template, from `open_format`"
    return template


def _told(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[dict[str, Any]], list[Tool]]:
    """The conversation as the template takes it, and the tools that are left for the template to tell of."""
    if template.knows_tools:
        return _for_template(messages), list(tools)
    return _for_template(as_text(messages, tools)), []


def _for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """With the roles that templates know, and calls as transformers gives them to templates."""
    known = {"developer": "system"}
    told: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": known.get(message["role"], message["role"]), "content": message["content"]}
        if "call_id" in message:
            turn["tool_call_id"] = message["call_id"]
        if message.get("calls"):
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _parsed(call.arguments)},
                }
                for call in message["calls"]
            ]
        told.append(turn)
    return told


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _check(style: PromptStyle, messages: Sequence[Message]) -> None:
    if style not in PROMPT_STYLES:
        raise UserError(f"unknown prompt style `{style}`; known: {', '.join(PROMPT_STYLES)}")
    if style == "none":
        raise UserError("this model was not trained on chat; send its prompt as plain text to /v1/completions")
    if not messages:
        raise UserError("`messages` is empty; send at least one message from the user")
    for n, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise UserError(f"`messages[{n}].role` is `{message['role']}`; known roles: {', '.join(ROLES)}")


def _render(
    tokenizer: Tokenizer, style: PromptStyle, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """messages: in roles that the styles know, without tools. A system message that says nothing adds nothing."""
    messages = [m for m in messages if m["role"] not in ("system", "developer") or m["content"].strip()]
    if not messages:
        raise UserError("`messages` holds an empty system message alone; send at least one message from the user")
    render = _render_chatml if style == "chatml" else _render_instruct
    return render(tokenizer, messages, add_generation_prompt)


def _render_chatml(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    start, end = tokenizer.special_id(CHATML_START), tokenizer.special_id(CHATML_END)
    if start is None or end is None:
        raise UserError(
            f"this checkpoint's tokenizer has no `{CHATML_START}` and `{CHATML_END}`; choose prompt style `instruct`"
        )
    newline = tokenizer.encode("\n")
    header = [start, *tokenizer.encode("assistant\n")]
    ids: list[int] = []
    learned: list[bool] = []
    for message in messages:
        if message["role"] == "assistant":
            # The header alone, since at serving time the model's own tokens begin after it.
            before, said = header, [*tokenizer.encode(message["content"]), end]
        else:
            # Header and content together, as training tokenized them: a leading "\n" joins the header's.
            role = "user" if message["role"] == "user" else "system"
            before, said = [start, *tokenizer.encode(f"{role}\n{message['content']}"), end], []
        ids += [*before, *said, *newline]
        learned += [False] * len(before) + [True] * len(said) + [False] * len(newline)
    if add_generation_prompt:
        ids += header
        learned += [False] * len(header)
    return ids, learned


def _render_instruct(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    waiting: list[str] = []  # what was said since the last response

    def add_block(response: list[int]) -> None:
        prompt = INSTRUCT_TURN.format(instruction="\n".join(waiting))
        before = tokenizer.encode(prompt if ids else INSTRUCT_PREAMBLE + prompt)
        ids.extend([*before, *response])
        learned.extend([False] * len(before) + [True] * len(response))
        waiting.clear()

    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            waiting.append(message["content"])
        elif waiting:
            add_block([*tokenizer.encode(message["content"]), tokenizer.eos_id])
        else:
            raise UserError(
                f"`messages[{n}]` is a response to nothing; an instruct model needs an instruction before it"
            )
    if add_generation_prompt and not waiting:
        raise UserError("the last message is the assistant's; an instruct model needs one from the user to answer")
    if waiting and not add_generation_prompt:
        raise UserError("the last message has no response; a finished conversation ends with the assistant's")
    if waiting:
        add_block([])
    return ids, learned
