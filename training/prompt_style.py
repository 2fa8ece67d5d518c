"""Which prompt style a finetune is rendered in, and what decided it; nothing is read out of the letters of a name.

The first of these decides: --prompt-style or --chat-template; a recipe with a style of its own (`chat`); a base that
was trained on a style or has a chat template; the rows. A base keeps its style whatever the rows are, since that is
what it answers to: an instruct base reads a conversation as several instructions, a chat base reads an instruction as
the user's turn (`mpt/prompts.py`). A tokenizer without ChatML's tokens gets them (`training/batches.py`).
"""

from collections.abc import Callable
from typing import Any

from mpt.catalog import find_local, resolve, stated_style
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import CheckpointNotFound, UserError
from mpt.prompts import PROMPT_STYLES, PromptStyle
from mpt.tokenizer import CHATML_END, CHATML_START
from training import batches, datasets, recipes, vocabulary
from training.run import Run

StyleOf = Callable[[str], tuple[PromptStyle, str]]


def choose(
    run: Run, recipe: str, given: PromptStyle | None, style_of: StyleOf | None = None
) -> tuple[PromptStyle, str]:
    """The style, and what decided it, in words. run: of this recipe. style_of: what a set's rows are made for;
    by default as finetuning reads them.

    Raises UserError where nothing decides, and for ChatML on a tokenizer that neither has its tokens nor can get them.
    """
    style, reason = _decide(run, recipe, given, style_of)
    return style, reason + (_tokens_added(run) if style == "chatml" else "")


def _decide(run: Run, recipe: str, given: PromptStyle | None, style_of: StyleOf | None) -> tuple[PromptStyle, str]:
    if given is not None:
        return given, "given by --prompt-style" if run.chat_template is None else "given by --chat-template"
    if recipe in recipes.FINETUNES and recipes.FINETUNES[recipe].fixes_style:
        return run.prompt_style, f"part of the recipe `{recipe}`"
    base = str(run.base)
    try:
        stated = stated_style(base)
    except CheckpointNotFound:  # nothing is known of what no catalog has before it is here
        stated = stated_style(resolve(base))
    if stated is not None and stated[0] != "none":  # `none`: trained on text alone, so the rows decide
        style, source = stated
        return style, f"the base's own, from {source}"
    return datasets.style_of(run.data, run.columns) if style_of is None else style_of(run.data)


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


def _tokens_added(run: Run) -> str:
    """What is said of a tokenizer that gets ChatML's tokens; of a base that is still to be downloaded, nothing."""
    place = find_local(str(run.base))
    if place is None:
        return ""
    before = open_tokenizer(vocabulary.find(run.tokenizer) if run.tokenizer else place)
    tokenizer = batches.load_tokenizer(recipes.change(run, prompt_style="chatml"))
    if before.special_id(CHATML_START) is not None:
        return ""
    ids = " and ".join(str(tokenizer.special_id(token)) for token in (CHATML_START, CHATML_END))
    frozen = (
        ""
        if run.lora is None
        else "; adapters leave their embeddings as they are, so a run without --lora learns them better"
    )
    return f"; its tokens are added to the tokenizer as ids {ids}{frozen}"
