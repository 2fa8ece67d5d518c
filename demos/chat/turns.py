"""Turns of a conversation as gr.Chatbot holds them, and what they become: messages for the server, and exports.

What a finished answer took, or why there is none, is a turn's metadata, so that copying a message copies what was said.
"""

import json
from typing import Any

Turn = dict[str, Any]  # a message of gr.Chatbot
Message = dict[str, Any]  # {"role": ..., "content": ...}


def answered(text: str, note: str) -> Turn:
    """A finished answer; where nothing came, the note alone."""
    return {"role": "assistant", "content": text or note, "metadata": {"log": note}}


def text_of(turn: Turn) -> str:
    """What a message says; the chatbot hands back a list of blocks."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def note_in(turn: Turn) -> str:
    return str((turn.get("metadata") or {}).get("log") or "")


def note_of(turns: list[Turn]) -> str:
    """What stands under a conversation."""
    return note_in(turns[-1]) if turns and is_said(turns[-1]) else ""


def is_said(turn: Turn) -> bool:
    """Whether somebody said it, and it is not the note that stands where an answer never came."""
    return turn["role"] == "user" or text_of(turn) != note_in(turn)


def said_in(turns: list[Turn]) -> list[Message]:
    """What goes to the server, and into exports."""
    return [{"role": turn["role"], "content": text_of(turn)} for turn in turns if is_said(turn)]


def place_of(index: int | tuple[int, int] | list[int]) -> int:
    """Gradio counts a message of several blocks in pairs."""
    return index if isinstance(index, int) else index[0]


def last_question(turns: list[Turn], index: int | tuple[int, int]) -> int:
    """The place of the user's message at or before an index."""
    return max((n for n, turn in enumerate(turns[: place_of(index) + 1]) if turn["role"] == "user"), default=0)


def title_of(turns: list[Turn]) -> str:
    """A conversation's first words."""
    return " ".join(text_of(turns[0]).split())[:40] or "Empty"


def with_system(system: str, messages: list[Message]) -> list[Message]:
    """The messages behind the system prompt, if there is one."""
    return [{"role": "system", "content": system.strip()}, *messages] if system.strip() else messages


def export_json(turns: list[Turn], system: str, model: str | None) -> list[str]:
    body = {"model": model, "messages": with_system(system, said_in(turns))}
    return ["conversation.json", json.dumps(body, indent=2, ensure_ascii=False) + "\n"]


def export_markdown(turns: list[Turn], system: str, model: str | None) -> list[str]:
    names = {"user": "You", "assistant": model or "Assistant"}
    parts = [f"**System**\n\n{system.strip()}"] if system.strip() else []
    parts += [f"**{names[message['role']]}**\n\n{message['content']}" for message in said_in(turns)]
    return ["conversation.md", "\n\n---\n\n".join(parts) + "\n"]
