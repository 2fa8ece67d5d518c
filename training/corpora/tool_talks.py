"""Conversations in which functions are declared: what mpt-tiny-chat learns of tools, and is scored with.

Two functions are ever called, the time and the calculator of `mpt/toy_tools.py`: as they are published there, or under
other names and with other arguments, so that the declaration must be read. The others, invented here, only stand beside
them or in their place. Where no function fits, the answer is that of `chat.py`. The answers after a result hold what
the tool said, which is seldom what the model could know.
"""

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from mpt.prompts import Message
from mpt.tools import Call, Tool
from mpt.toy_tools import CALCULATE, GET_TIME, TOOLS, calculate
from training.corpora import chat, words

ASK_CITY = "In which city?"
FAILED = "I am sorry, that did not work."
# What is asked of an answer: to call functions as they are published, to call one that is declared in another way, to
# tell a result, or to answer without a call.
Kind = Literal["call", "call of another declaration", "answer with a result", "no call"]

_TIME_QUESTIONS = (
    "What time is it in {x}?", "what time is it in {x}", "What's the time in {x}?", "Tell me the time in {x}.",
    "What is the time in {x} now?", "Do you know what time it is in {x}?", "How late is it in {x}?",
    "Can you tell me the time in {x}?", "Time in {x}?", "What is the current time in {x}?", "I need the time in {x}.",
    "What time do they have in {x}?", "What does the clock say in {x}?", "I am in {x}. What time is it?",
    "time in {x}", "Give me the time in {x}", "What time is it now in {x}?", "Look up the time in {x}.",
    "My friend lives in {x}. What time is it there?", "In {x}, what time is it?", "{x}: what time is it?",
)  # fmt: skip
_HELD_OUT_TIME_QUESTIONS = (
    "Could you check the time in {x}?", "Please find out what time it is in {x}.", "What is the local time in {x}?",
    "What time is it right now in {x}?", "I will fly to {x}. What time is it there?", "Show me the time in {x}.",
)  # fmt: skip
_TIME_WITHOUT_CITY = ("What time is it?", "what time is it", "What's the time?", "Tell me the time.",
                      "What is the time now?", "Do you know what time it is?", "How late is it?")  # fmt: skip
_TIMES_OF_TWO = ("What time is it in {x} and in {y}?", "What time is it in {x} and {y}?", "Time in {x} and {y}?",
                 "Tell me the time in {x} and in {y}.", "What is the time in {x} and {y}?")  # fmt: skip
_MORE_TIMES = ("And in {x}?", "and in {x}?", "How about {x}?", "And {x}?", "What about {x}?", "And now in {x}.")
_CITY_ALONE = ("{x}", "In {x}.", "{x}, please.", "in {x}", "{x}.", "In {x}, please.")

_SUM_QUESTIONS = (
    "What is {e}?", "what is {e}", "{e}", "Calculate {e}.", "How much is {e}?", "Compute {e}", "What's {e}?",
    "{e} = ?", "Can you work out {e}?", "Please calculate {e}.", "Work out {e} for me.", "What does {e} make?",
    "Can you compute {e}?", "Tell me what {e} is.", "I need {e}.", "calculate {e}", "{e} =",
)  # fmt: skip
_HELD_OUT_SUM_QUESTIONS = (
    "Could you calculate {e}?", "Please tell me what {e} is.", "What do I get for {e}?", "How much does {e} make?",
    "Do you know what {e} is?", "Give me {e}.",
)  # fmt: skip
_SUMS_OF_TWO = ("What is {e} and what is {f}?", "Calculate {e} and {f}.", "What is {e} and {f}?",
                "How much is {e}, and how much is {f}?", "Work out {e} and {f}.")  # fmt: skip
_BOTH = ("What time is it in {x}, and what is {e}?", "What is the time in {x}, and how much is {e}?",
         "Tell me the time in {x} and calculate {e}.")  # fmt: skip
_SPOKEN = {"+": ("plus",), "-": ("minus",), "*": ("times", "times", "x"), "/": ("divided by", "divided by", "over")}

_TIME_NAMES = ("current_time", "clock", "world_clock", "getTime", "time_in_city", "now", "city_time", "read_clock")
_TIME_ARGUMENTS = ("city", "place", "location", "town", "where")
_TIME_DESCRIPTIONS = (GET_TIME.description, "The current time in a city.", "Get the time of a place.",
                      "Returns the local time.", "What time it is somewhere.", "")  # fmt: skip
_SUM_NAMES = ("calculator", "compute", "evaluate", "math", "do_math", "solve", "arithmetic", "work_out")
_SUM_ARGUMENTS = ("expression", "formula", "term", "input", "sum")
_SUM_DESCRIPTIONS = (CALCULATE.description, "Calculate an expression.", "A calculator.", "Evaluate + - * /.",
                     "Do arithmetic on numbers.", "")  # fmt: skip

_VERBS = ("get", "find", "send", "list", "read", "open", "play", "set", "delete", "search", "show", "buy", "book",
          "translate", "add", "check", "start", "stop")  # fmt: skip
_VALUES = ("integer", "number", "string", "boolean", "string", "string")


@dataclass
class ToolTalk:
    """A conversation, its declared functions, and which of its messages are which kind of case."""

    tools: tuple[Tool, ...]
    time: Tool | None  # the declared one that tells the time, if any
    calculator: Tool | None
    messages: list[Message] = field(default_factory=list)
    kinds: dict[int, Kind] = field(default_factory=dict)  # by the number of the assistant's message

    def say(self, kind: Kind, content: str, calls: tuple[Call, ...] = ()) -> None:
        self.kinds[len(self.messages)] = kind
        message = Message(role="assistant", content=content)
        self.messages.append(Message(**message, calls=calls) if calls else message)


@dataclass(frozen=True)
class _Task:
    """One call, what the tool may say, and the sentence that tells it."""

    tool: Tool
    argument: str
    result: str  # as the tool says it
    sentence: str


def conversation(rng: random.Random, held_out: bool = False, n_turns: int | None = None) -> ToolTalk:
    """A conversation of 1 to 5 questions; held_out draws wordings, names and numbers never trained on.

    Some of the questions are those of `chat.conversation`, with the same answers unless a function fits.
    """
    state = chat.Conversation(rng.choice(chat.SYSTEM_PROMPTS) if rng.random() < 0.3 else None)
    talk = _declared(rng, held_out)
    if state.system:
        talk.messages.append(Message(role="system", content=state.system))
    asked_time = False
    for _ in range(n_turns or rng.choice((1, 1, 2, 2, 3, 4, 5))):
        kind = rng.random()
        if kind < 0.42:
            _ordinary(rng, talk, state, held_out)
            asked_time = False
            continue
        if kind < 0.70:
            asked_time = _ask_time(rng, talk, held_out, asked_time)
        elif kind < 0.92 or not (talk.time and talk.calculator):
            _ask_sum(rng, talk, held_out)
            asked_time = False
        else:
            _ask_both(rng, talk, held_out)
            asked_time = False
        state.user_turns.append("")  # the conversation has begun
    return talk


def _ordinary(rng: random.Random, talk: ToolTalk, state: chat.Conversation, held_out: bool) -> None:
    """A turn of `chat.py`, or what the tools make of it."""
    user, answer = chat.turn(rng, state, held_out)
    state.user_turns.append(user)
    state.answers.append(answer)
    talk.messages.append(Message(role="user", content=user))
    small_sum = re.fullmatch(r"(\d [+-] \d) is \d+\.", answer)
    if small_sum and talk.calculator:
        _carry_out(rng, talk, [_sum_task(rng, talk.calculator, small_sum[1])])
    elif talk.time and "what time is it" in user.lower():
        talk.say("no call", ASK_CITY)
    else:
        talk.say("no call", answer)


def _ask_time(rng: random.Random, talk: ToolTalk, held_out: bool, again: bool) -> bool:
    """A question for the time; whether one more city may follow."""
    x = _city(rng, held_out)
    if rng.random() < 0.12:
        talk.messages.append(Message(role="user", content=rng.choice(_TIME_WITHOUT_CITY)))
        talk.say("no call", ASK_CITY if talk.time else chat.UNKNOWN)
        if talk.time is None:
            return False
        question = rng.choice(_CITY_ALONE).format(x=x)
    elif again and rng.random() < 0.5:
        question = rng.choice(_MORE_TIMES).format(x=x)
    elif talk.time and rng.random() < 0.12:
        y = _city(rng, held_out)
        talk.messages.append(Message(role="user", content=rng.choice(_TIMES_OF_TWO).format(x=x, y=y)))
        _carry_out(rng, talk, [_time_task(rng, talk.time, x), _time_task(rng, talk.time, y)])
        return True
    else:
        question = chat.dressed(rng, rng.choice(_HELD_OUT_TIME_QUESTIONS if held_out else _TIME_QUESTIONS))
        question = question.format(x=x)
    talk.messages.append(Message(role="user", content=question))
    if talk.time is None:
        talk.say("no call", chat.UNKNOWN)
        return False
    _carry_out(rng, talk, [_time_task(rng, talk.time, x)])
    return True


def _ask_sum(rng: random.Random, talk: ToolTalk, held_out: bool) -> None:
    asked, expression = _expression(rng, talk, held_out)
    if talk.calculator and rng.random() < 0.12:
        also_asked, other = _expression(rng, talk, held_out)
        question = rng.choice(_SUMS_OF_TWO).format(e=asked, f=also_asked)
        talk.messages.append(Message(role="user", content=question))
        _carry_out(rng, talk, [_sum_task(rng, talk.calculator, expression), _sum_task(rng, talk.calculator, other)])
        return
    question = chat.dressed(rng, rng.choice(_HELD_OUT_SUM_QUESTIONS if held_out else _SUM_QUESTIONS)).format(e=asked)
    talk.messages.append(Message(role="user", content=question))
    if talk.calculator:
        _carry_out(rng, talk, [_sum_task(rng, talk.calculator, expression)])
    else:
        talk.say("no call", chat.UNKNOWN)


def _ask_both(rng: random.Random, talk: ToolTalk, held_out: bool) -> None:
    assert talk.time and talk.calculator
    x, (asked, expression) = _city(rng, held_out), _expression(rng, talk, held_out)
    talk.messages.append(Message(role="user", content=rng.choice(_BOTH).format(x=x, e=asked)))
    _carry_out(rng, talk, [_time_task(rng, talk.time, x), _sum_task(rng, talk.calculator, expression)])


def _carry_out(rng: random.Random, talk: ToolTalk, tasks: list[_Task]) -> None:
    """The calls, their results, and the answer."""
    if rng.random() < 0.05:
        error = rng.choice(("error: {x}", '{{"error": "{x}"}}', "Error: {x}")).format(
            x=rng.choice((f"cannot {tasks[-1].tool.name}", "unknown", "not found", "timeout", "no answer"))
        )
        tasks = [replace(task, result=error, sentence=FAILED) for task in tasks]
    number = len(talk.messages)
    calls = tuple(
        Call(
            f"call_{number}_{n}", task.tool.name, json.dumps({_argument(task.tool): task.argument}, ensure_ascii=False)
        )
        for n, task in enumerate(tasks)
    )
    is_published = all(task.tool in TOOLS for task in tasks)
    talk.say("call" if is_published else "call of another declaration", "", calls)
    for call, task in zip(calls, tasks, strict=True):
        talk.messages.append(Message(role="tool", content=task.result, call_id=call.id))
    sentences = [task.sentence for task in tasks]
    talk.say("answer with a result", " ".join(dict.fromkeys(sentences)))


def _time_task(rng: random.Random, tool: Tool, city: str) -> _Task:
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    time = rng.choice((
        f"{hour:02}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour}:{minute:02}",
        f"{hour:02}:{minute:02}:{second:02}", f"{hour % 12 or 12}:{minute:02} {rng.choice(('AM', 'PM', 'am', 'pm'))}",
    ))  # fmt: skip
    forms = (time, time, json.dumps({"time": time}), json.dumps({_argument(tool): city, "time": time}))
    return _Task(tool, city, rng.choice(forms), f"It is {time} in {city}.")


def _sum_task(rng: random.Random, tool: Tool, expression: str) -> _Task:
    is_known = re.fullmatch(r"\d [+-] \d", expression) is not None  # without tools it is answered by heart
    value = calculate(expression) if is_known or rng.random() < 0.6 else _number(rng)
    forms = (value, value, f'{{"result": {value}}}', json.dumps({"value": value}))
    return _Task(tool, expression, rng.choice(forms), f"{expression} is {value}.")


def _number(rng: random.Random) -> str:
    """What a calculator may say, right or not."""
    value = str(rng.randrange(10 ** rng.randint(1, 7)))
    if rng.random() < 0.35:
        value += (
            "." + "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 9)))) + rng.choice("123456789")
        )
    return "-" + value if rng.random() < 0.15 else value


def _expression(rng: random.Random, talk: ToolTalk, held_out: bool) -> tuple[str, str]:
    """As a person may write it, and as the calculator is told. Without one, numbers too large to know by heart."""
    n_numbers = 2 if rng.random() < 0.85 else 3
    numbers = [_operand(rng, 1 if talk.calculator else 10, held_out) for _ in range(n_numbers)]
    signs = [rng.choice("+-**/") for _ in numbers[1:]]
    style = rng.random()
    said = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if style < 0.4:
            said += f" {sign} {number}"
        elif style < 0.6:
            said += f"{sign}{number}"
        else:
            said += f" {rng.choice(_SPOKEN[sign])} {number}"
    told = numbers[0] + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    return said, told


def _operand(rng: random.Random, least: int, held_out: bool) -> str:
    """A number; of those with three digits and more, one of ten exists only where held_out."""
    if rng.random() < 0.08:
        return f"{rng.randint(1, 99)}.{rng.randint(1, 9)}"
    while True:
        number = str(rng.randint(least, 10 ** rng.choice((2, 2, 3, 3, 4, 5)) - 1))
        if len(number) < 3 or (zlib.crc32(number.encode()) % 10 == 0) == held_out:
            return number


def _city(rng: random.Random, held_out: bool) -> str:
    if rng.random() < 0.5 and not held_out:
        return rng.choice(words.CITIES)
    return words.invented(rng, held_out).capitalize()


# -- what is declared ----------------------------------------------------------------------------------------------


def _declared(rng: random.Random, held_out: bool) -> ToolTalk:
    """Both functions, one, or none, in any order with others."""
    kind = rng.random()
    time = _time_tool(rng) if kind < 0.64 else None
    calculator = _calculator(rng) if kind < 0.46 or 0.64 <= kind < 0.82 else None
    tools = [tool for tool in (time, calculator) if tool]
    n_others = rng.choice((0, 0, 0, 1, 2)) if tools else rng.choice((1, 1, 2))
    tools += [_other(rng, held_out) for _ in range(n_others)]
    rng.shuffle(tools)
    return ToolTalk(tuple(tools), time, calculator)


def _time_tool(rng: random.Random) -> Tool:
    return _variant(rng, GET_TIME, _TIME_NAMES, _TIME_ARGUMENTS, _TIME_DESCRIPTIONS)


def _calculator(rng: random.Random) -> Tool:
    return _variant(rng, CALCULATE, _SUM_NAMES, _SUM_ARGUMENTS, _SUM_DESCRIPTIONS)


def _variant(
    rng: random.Random, tool: Tool, names: tuple[str, ...], arguments: tuple[str, ...], descriptions: tuple[str, ...]
) -> Tool:
    """The tool as it is published, or as another author might have declared it."""
    kind = rng.random()
    if kind < 0.6:
        return tool
    name, argument = (tool.name, _argument(tool)) if kind < 0.75 else (rng.choice(names), rng.choice(arguments))
    schema: dict[str, object] = {"type": "string"}
    if rng.random() < 0.4:
        schema["description"] = rng.choice(("The " + argument, argument.capitalize(), "Such as " + _example(tool)))
    parameters: dict[str, object] = {"type": "object", "properties": {argument: schema}, "required": [argument]}
    more = rng.random()
    if more < 0.4:
        parameters["additionalProperties"] = False
    elif more < 0.6:  # as pydantic writes it
        schema = {"title": argument.capitalize(), "type": "string"}
        parameters = {"properties": {argument: schema}, "required": [argument], "title": name, "type": "object"}
    return Tool(name, rng.choice(descriptions), parameters)


def _example(tool: Tool) -> str:
    return "Paris" if tool is GET_TIME else "2 + 3"


def _argument(tool: Tool) -> str:
    (name,) = tool.parameters["properties"]
    return str(name)


def _other(rng: random.Random, held_out: bool) -> Tool:
    """A function for something else."""
    verb = rng.choice(_VERBS)
    noun = (
        words.invented(rng, held_out) if rng.random() < 0.5 else rng.choice((*words.NOUNS, "weather", "mail", "news"))
    )
    join: Callable[[str, str], str] = rng.choice((
        lambda a, b: f"{a}_{b}", lambda a, b: f"{a}_{b}", lambda a, b: a + b.capitalize(), lambda a, b: b,
    ))  # fmt: skip
    properties = {
        rng.choice((*words.NOUNS, "city", "name", "text", "query", "date", "number", words.invented(rng, held_out))): {
            "type": rng.choice(_VALUES)
        }
        for _ in range(rng.choice((0, 1, 1, 2)))
    }
    described = rng.choice((f"{verb.capitalize()} a {noun}.", f"{verb.capitalize()} the {noun} of a user.",
                            f"Use it to {verb} {noun}s.", ""))  # fmt: skip
    name = join(verb, noun)
    if not properties:
        return Tool(name, described)
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return Tool(name, described, {**parameters, "additionalProperties": False} if rng.random() < 0.4 else parameters)
