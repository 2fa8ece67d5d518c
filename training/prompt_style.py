"""Which prompt style a finetune is rendered in, and what decided it; nothing is read out of the letters of a name.

The first of these decides: --prompt-style or --chat-template; a recipe with a style of its own (`chat`); a base that
was trained on a style or has a chat template; the rows. A base keeps its style whatever the rows are, since that is
what it answers to: an instruct base reads a conversation as several instructions, a chat base reads an instruction as
the user's turn (`mpt/prompts.py`).
"""

from typing import Any

from mpt.catalog import find_local, stated_style
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.prompts import PROMPT_STYLES, PromptStyle
from mpt.tokenizer import CHATML_START
from training import datasets, recipes, vocabulary
from training.run import Run


def choose(run: Run, recipe: str, given: PromptStyle | None) -> tuple[PromptStyle, str]:
    """The style, and what decided it, in words. run: of this recipe. Raises UserError where nothing decides."""
    if given is not None:
        return given, "given by --prompt-style" if run.chat_template is None else "given by --chat-template"
    if recipes.FINETUNES[recipe].fixes_style:
        return run.prompt_style, f"part of the recipe `{recipe}`"
    stated = stated_style(str(run.base))
    if stated is not None and stated[0] != "none":  # `none`: trained on text alone, so the rows decide
        style, source = stated
        return style, f"the base's own, from {source}"
    style, reason = datasets.style_of(run.data, run.columns)
    if style == "chatml" and _lacks_chatml(run):
        raise UserError(
            f"{reason}, for ChatML, and the tokenizer has no `{CHATML_START}`; give --prompt-style instruct, "
            "or --tokenizer with the folder of one that has it, such as mpt-7b-chat's"
        )
    return style, reason


def settle(changes: dict[str, Any]) -> None:
    """Make of `--chat-template` what a run keeps: a style's name is that style, a file goes with style `template`."""
    asked = changes.get("chat_template")
    if asked is None:
        return
    if "prompt_style" in changes:
        raise UserError(
            f"`--chat-template {asked}` and `--prompt-style {changes['prompt_style']}` contradict each other; "
            "give one of them"
        )
    changes["prompt_style"] = changes.pop("chat_template") if asked in PROMPT_STYLES else "template"


def _lacks_chatml(run: Run) -> bool:
    """Whether a tokenizer on this machine cannot write ChatML; one that is still to be downloaded is not judged."""
    folder = vocabulary.find(run.tokenizer) if run.tokenizer else find_local(str(run.base))
    return folder is not None and open_tokenizer(folder).special_id(CHATML_START) is None
