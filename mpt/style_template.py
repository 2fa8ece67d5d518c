"""The prompt styles of `mpt/prompts.py` as Jinja, for tools that render chats themselves.

They differ from ours in one thing no template can do: content that spells a control token becomes one.
"""

from dataclasses import dataclass
from pathlib import Path

from mpt.chat_template import write_template
from mpt.prompts import INSTRUCT_PREAMBLE, PromptStyle
from mpt.tokenizer import CHATML_END, CHATML_START

_CHATML = """\
{%- set found = namespace(system=false) -%}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'developer'] -%}{%- set found.system = true -%}{%- endif -%}
{%- endfor -%}
{%- set default = SYSTEM -%}
{%- if default and not found.system -%}{{- 'STARTsystem\\n' + default + 'END\\n' -}}{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- if role != 'system' or message['content'] | trim -%}
        {{- 'START' + role + '\\n' + message['content'] + 'END\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'STARTassistant\\n' -}}{%- endif -%}
"""
_INSTRUCT = """\
{%- set seen = namespace(waiting='', any=false, blocks=0) -%}
{%- macro block() -%}
    {{- ('' if seen.blocks else PREAMBLE) + '### Instruction:\\n' + seen.waiting + '\\n\\n### Response:\\n' -}}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'developer'] and not message['content'] | trim -%}
    {%- elif message['role'] != 'assistant' -%}
        {%- set seen.waiting = seen.waiting + '\\n' + message['content'] if seen.any else message['content'] -%}
        {%- set seen.any = true -%}
    {%- else -%}
        {{- block() + message['content'] + eos_token -}}
        {%- set seen.waiting = '' -%}{%- set seen.any = false -%}{%- set seen.blocks = seen.blocks + 1 -%}
    {%- endif -%}
{%- endfor -%}
{%- if seen.any and add_generation_prompt -%}{{- block() -}}{%- endif -%}
"""


@dataclass(frozen=True)
class StyleTemplate:
    """A style's template, to be written beside the files of a checkpoint whose manifest names the style."""

    source: str

    def save(self, folder: Path) -> None:
        write_template(folder, self.source, {})


def jinja(style: PromptStyle, system_default: str | None = None) -> str | None:
    """The template of a style, None for models without chat. system_default: of conversations that bring none."""
    if style == "chatml":
        text = _CHATML.replace("SYSTEM", _quoted(system_default or ""))
        return text.replace("START", CHATML_START).replace("END", CHATML_END)
    return _INSTRUCT.replace("PREAMBLE", _quoted(INSTRUCT_PREAMBLE)) if style == "instruct" else None


def _quoted(text: str) -> str:
    """As a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
