"""Turns of a conversation, and what they become: messages for the server, and exports.

What a finished answer took, or why there is none, is a turn's note, so that copying a message copies what was said.
"""

import html
import json
from typing import Any

try:
    from demos.mpt_text import html_of
except ImportError:  # a copied Space has the module beside it
    from mpt_text import html_of  # type: ignore[no-redef]

Turn = dict[str, Any]  # "role": "user" or "assistant", "content", "note", and "html": how the content looks
Message = dict[str, Any]  # {"role": ..., "content": ...}


def asked(text: str) -> Turn:
    """What a person says, which looks as it was typed."""
    return {"role": "user", "content": text, "note": "", "html": f'<p class="typed">{html.escape(text)}</p>'}


def answered(text: str, note: str) -> Turn:
    """An answer, which is Markdown; a finished one has a note, and where nothing came it is the note."""
    text = text or note
    return {"role": "assistant", "content": text, "note": note, "html": html_of(text)}


def restored(turn: Turn) -> Turn:
    """A turn that was saved in a browser, perhaps by an earlier version of the page."""
    content = turn["content"]
    text = content if isinstance(content, str) else "".join(block["text"] for block in content)
    note = turn.get("note") or (turn.get("metadata") or {}).get("log") or ""
    return asked(text) if turn["role"] == "user" else answered(text, str(note))


def note_of(turns: list[Turn]) -> str:
    """What stands under a conversation."""
    return turns[-1]["note"] if turns and is_said(turns[-1]) else ""


def is_said(turn: Turn) -> bool:
    """Whether somebody said it, and it is not the note that stands where an answer never came."""
    return turn["role"] == "user" or turn["content"] != turn["note"]


def said_in(turns: list[Turn]) -> list[Message]:
    """What goes to the server, and into exports."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns if is_said(turn)]


def last_question(turns: list[Turn], index: int) -> int:
    """The place of the user's message at or before an index."""
    return max((n for n, turn in enumerate(turns[: index + 1]) if turn["role"] == "user"), default=0)


def title_of(turns: list[Turn]) -> str:
    """A conversation's first words."""
    return " ".join(restored(turns[0])["content"].split())[:40] or "Empty"


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
