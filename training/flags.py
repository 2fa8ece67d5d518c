"""The flags that set a field of a run: name, type, range, default and help are those of the field in `training/run.py`.

A field with a help text has a flag in `train finetune` and in `train pretrain`; nothing is written for it elsewhere.
"""

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

import typer

from mpt.errors import UserError
from training.run import Declaration, Lora, declarations

Command = Callable[..., None]


def of_run(only: Sequence[str] = (), without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Give a command that takes `**given` the flags of a run's fields, all with a help text or `only` these.

    In the help the flags before `--out`, which say what is trained, come first; then the command's own parameters up to
    its `*`, the other flags, and the command's keyword-only parameters.
    """
    with_flag = {declared.name: declared for declared in declarations() if declared.setting.help}
    names = [name for name in only or with_flag if name not in without]
    n_first = names.index("out") if "out" in names else 0
    flags = [_parameters(with_flag[name]) for name in names]

    def add(command: Command) -> Command:
        own = inspect.signature(command).parameters.values()
        parameters = [
            *(parameter for pair in flags[:n_first] for parameter in pair),
            *(parameter for parameter in own if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(parameter for pair in flags[n_first:] for parameter in pair),
            *(parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY),
        ]
        by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        command.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]  # typer reads it
        return command

    return add


def changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that flags were given for, with their values. Raises UserError for flags that contradict."""
    values = dict(given)
    if (warmup := values.pop("warmup_steps", None)) is not None:
        values |= _warmup(warmup)
    rank, qlora_rank = values.pop("lora", None), values.pop("qlora", None)
    dora, rslora = bool(values.pop("dora", False)), bool(values.pop("rslora", False))
    if rank is not None and qlora_rank is not None:
        raise UserError("give --lora or --qlora, one of the two")
    if rank is not None:
        values["lora"] = Lora(rank=rank, dora=dora, rslora=rslora)
    elif qlora_rank is not None:
        values["lora"] = Lora(rank=qlora_rank, bits=4, dora=dora, rslora=rslora)
    elif dora or rslora:
        raise UserError(
            f"`--{'dora' if dora else 'rslora'}` is a kind of adapter; give its rank too, for example `--lora 16`"
        )
    return {name: value for name, value in values.items() if value is not None and value is not False and value != []}


def text(name: str, value: Any) -> str | None:
    """How a field is set to a value on the command line; None where no flag can."""
    setting = next(declared.setting for declared in declarations() if declared.name == name)
    if not setting.help or value is None or isinstance(value, bool):
        return None
    return f"{flag_of(name)} {shlex.quote(str(value))}"


def flag_of(name: str) -> str:
    """The name of a field's flag."""
    setting = next(declared.setting for declared in declarations() if declared.name == name)
    return setting.flag or f"--{name.replace('_', '-')}"


def _warmup(given: float) -> dict[str, Any]:
    """What `--warmup` sets: below 1 it is a share of the run, else a number of steps. Raises UserError."""
    if 0 < given < 1:
        return {"warmup_steps": 0, "warmup_share": given}
    if given != int(given):
        raise UserError(f"`--warmup` is {given}; give a whole number of steps, or a share of the run below 1")
    return {"warmup_steps": int(given), "warmup_share": 1.0 if given else 0.0}


def _parameters(declared: Declaration) -> list[inspect.Parameter]:
    """A field's flag, as a parameter of a typer command; of `lora` two, which take the rank, and two for its kind."""
    if declared.kind is not Lora:
        return [_parameter(declared)]
    more = [
        ("qlora", int, "RANK", "The same beside frozen matrices in 4 bits (QLoRA)."),
        ("dora", bool, None, "With --lora or --qlora: train the length of each matrix's rows too (DoRA)."),
        ("rslora", bool, None, "With --lora or --qlora: scale by the root of the rank (rsLoRA)."),
    ]
    flags = [dataclasses.replace(declared, kind=int)]
    flags += [
        dataclasses.replace(
            declared, name=name, kind=kind, setting=dataclasses.replace(declared.setting, help=text, metavar=metavar)
        )
        for name, kind, metavar, text in more
    ]
    return [_parameter(flag) for flag in flags]


def _parameter(declared: Declaration) -> inspect.Parameter:
    setting, kind, metavar = declared.setting, declared.kind, declared.setting.metavar
    if declared.name == "warmup_steps":
        kind, metavar = float, "STEPS|SHARE"
    annotation, default = kind | None, None
    if kind is bool:
        annotation, default = bool, False
    elif get_origin(kind) is tuple:  # typer knows no list of choices: the run checks them
        annotation = list[str] | None
        metavar = f"<{'|'.join(get_args(get_args(kind)[0]))}>"
    limits = f" ({setting.limits})." if setting.limits else "."
    option = typer.Option(
        default,
        setting.flag or f"--{declared.name.replace('_', '-')}",  # not flag_of: --qlora is no field
        metavar=metavar,
        help=setting.help.removesuffix(".") + limits,
        show_default=setting.default or _shown(declared.default),
    )
    return inspect.Parameter(declared.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _shown(default: Any) -> str | bool:
    """A field's default for the help; False shows none, for a field without one or with one that says nothing."""
    return False if default in (dataclasses.MISSING, None, False, ()) else str(default)


def refuse(given: Mapping[str, object], why: str) -> None:
    """Raises UserError for the first option that has a value."""
    for option, value in given.items():
        if value:
            raise UserError(f"`{option}` {why}")
