"""Makes the mpt-tiny family: tokenizer, base, and the three finetunes, each scored, written to `mpt/tiny/`.

Every stage is a run in a folder of its own under the work folder, so an interrupted `train tiny` goes on where it was.
"""

import datetime
import json
import logging
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mpt.errors import UserError
from mpt.files import whole_folder
from mpt.manifest import MANIFEST, read_manifest, write_manifest
from mpt.tokenizer import Tokenizer
from training import loop, recipes, vocabulary
from training.corpora import chat, novels, yaml_json
from training.evaluation import tiny_tasks
from training.run import Run

log = logging.getLogger(__name__)

NAMES = ("mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter")
PACKAGED = Path(__file__).resolve().parents[1] / "mpt" / "tiny"
_DOCS = Path(__file__).resolve().parents[1] / "docs" / "tiny.md"
# The stages whose weights' mean a model is: what the last has lost of the one before, the mean has most of.
_MEANS = {"mpt-tiny-instruct": ("mpt-tiny-instruct-fifth", "mpt-tiny-instruct")}
_CHARACTERS_PER_NOVEL = 200_000
_DOCUMENTS = 4000  # generated ones of each kind; with the novels, 6 MB


def make(
    work: Path,
    names: Sequence[str] = NAMES,
    report: Callable[[loop.Metrics], None] = lambda _: None,
    packaged: Path = PACKAGED,
    docs: Path = _DOCS,
) -> dict[str, tiny_tasks.Scores]:
    """Train, score and package these models; the scores by name. Finished stages are taken as they are.

    Raises UserError when the novels are missing, or the base that a finetune needs.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"no tiny model `{name}`; known: {', '.join(NAMES)}")
    novels.training_files()
    novels.held_out_text()
    tokenizer = make_tokenizer(work / "tokenizer")
    scores = {}
    for name in NAMES:
        if name not in names:
            continue
        for run in _stages(name, work, str(tokenizer)):
            log.info("%s: %s", run.name, run.out)
            model = loop.fit(run, report)
        if name in _MEANS:
            model = mean([work / stage / "model" for stage in _MEANS[name]], work / name / "mean")
        path = work / name / "scores.json"
        if not path.is_file():
            tiny_tasks.write(tiny_tasks.evaluate(str(model)), path)
        scores[name] = json.loads(path.read_text(encoding="utf-8"))
        package(model, scores[name], packaged / name)
    write_docs(work, docs)
    return scores


def _stages(name: str, work: Path, tokenizer: str) -> list[Run]:
    """The runs that make a model, each starting from the one before. Raises UserError when the base is missing."""

    def out(stage: str) -> str:
        return str(work / stage)

    def model(stage: str) -> str:
        return str(work / stage / "model")

    if name == "mpt-tiny":
        first = recipes.mpt_tiny_copying(out("mpt-tiny-copying"), tokenizer)
        return [first, recipes.mpt_tiny(out(name), model("mpt-tiny-copying"))]
    base = model("mpt-tiny")
    if not (Path(base) / MANIFEST).is_file():
        raise UserError(f"`{name}` starts from mpt-tiny, which is not in `{base}`; make it first")
    if name == "mpt-tiny-instruct":
        stages = ("first", "second", "third", "fourth", "fifth")
        at_first, second, third, fourth, fifth = (f"{name}-{stage}" for stage in stages)
        return [
            recipes.mpt_tiny_instruct_first(out(at_first), base, str(_tokenizer_apart(work))),
            recipes.mpt_tiny_instruct_second(out(second), model(at_first)),
            recipes.mpt_tiny_instruct_third(out(third), model(second)),
            recipes.mpt_tiny_instruct_fourth(out(fourth), model(third)),
            recipes.mpt_tiny_instruct_fifth(out(fifth), model(fourth)),
            recipes.mpt_tiny_instruct(out(name), model(fifth)),
        ]
    if name == "mpt-tiny-chat":
        first = recipes.mpt_tiny_chat_first(out("mpt-tiny-chat-first"), base)
        return [first, recipes.mpt_tiny_chat(out(name), model("mpt-tiny-chat-first"))]
    return [recipes.mpt_tiny_storywriter(out(name), base)]


def mean(models: Sequence[Path], out: Path) -> Path:
    """A checkpoint with the mean of the weights of these, else the last one; out is left as it is where it is there.

    Summed in float32 and rounded once. Source: Wortsman et al. 2022, of models that were trained from one another.
    """
    if out.is_dir():
        return out
    weights = [load_file(model / "model.safetensors") for model in models]
    manifest = {key: value for key, value in (read_manifest(models[-1]) or {}).items() if key != "files"}
    with whole_folder(out) as partial:
        shutil.copytree(models[-1], partial, dirs_exist_ok=True, copy_function=shutil.copyfile)
        means = {name: torch.stack([part[name].float() for part in weights]).mean(0) for name in weights[0]}
        kept = {name: value.to(weights[0][name].dtype) for name, value in means.items()}
        save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
        write_manifest(partial, {**manifest, "mean_of": [_work_of_any(str(model)) for model in models]})
    return out


def package(model: Path, scores: tiny_tasks.Scores, target: Path) -> None:
    """Copy a finished checkpoint to where the catalog finds it, its scores in the manifest."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, copy_function=shutil.copyfile)  # not the private mode of temporary files
    manifest = {key: value for key, value in (read_manifest(model) or {}).items() if key != "files"}
    recipe = {**manifest.get("recipe", {})}
    for key in ("base", "out"):  # where it was made is of no use elsewhere
        if recipe.get(key) is not None:
            recipe[key] = _work_of_any(recipe[key])
    write_manifest(partial, {**manifest, "recipe": recipe, "scores": tiny_tasks.compact(scores)})
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)


def _work_of_any(path: str) -> str:
    """A stage's path, `mpt-tiny/model` or `mpt-tiny`, under the work folder that `train tiny` has unless told."""
    parts = Path(path).parts
    return str(Path("runs/tiny", *parts[-2 if parts[-1] == "model" else -1 :]))


def make_tokenizer(folder: Path) -> Path:
    """The family's tokenizer, trained unless it is already there."""
    if not folder.is_dir():
        with whole_folder(folder) as partial:
            vocabulary.train(_texts(), vocab_size=2048).save(partial)
    return folder


def _tokenizer_apart(work: Path) -> Path:
    """The instruct model's tokenizer: the family's, cut otherwise."""
    folder = work / "tokenizer-apart"
    if not folder.is_dir():
        with whole_folder(folder) as partial:
            vocabulary.apart(Tokenizer.from_folder(work / "tokenizer")).save(partial)
    return folder


def _texts() -> Iterator[str]:
    for path in novels.training_files():
        yield novels.read(path)[:_CHARACTERS_PER_NOVEL]
    for number in range(_DOCUMENTS):
        pair = yaml_json.pair(random.Random(number))
        yield f"{pair.yaml}\n\n{pair.json}"
        yield "\n".join(message["content"] for message in chat.conversation(random.Random(number)).messages())


_HEAD = """# The mpt-tiny family

Four real MPT checkpoints of {n_parameters:,} parameters (width {d_model}, {n_heads} heads, {n_layers} layers, a
vocabulary of {vocab_size:,}), made by this repository's own recipes from fixed seeds. `make tiny` makes them again,
scores them and writes this page.

Each is good at one narrow thing and at nothing else: the weights are 7 MB. They are trained on generated text and on
public-domain novels; The Great Gatsby is kept out of training and used for scoring, and every invented name of a scored
document or conversation is one that training never generates. The instruct model's tokenizer has the same tokens as the
others' and cuts text otherwise: each bracket is a token of its own, and no space joins a word.

Of the task `tools`, `call` counts the answers that must call `get_time` or `calculate` as
[mpt/toy_tools.py](../mpt/toy_tools.py) declares them, `call of another declaration` those that must call such a
function with another name, argument or description. Functions are declared in all of its conversations, some of them
only for something else. Held out are names, numbers of three digits and more, and the wordings of the questions, but
for those that ask for two things at once, name a city alone, or ask for one more.

The instruct model has two scores. `yaml_to_json` asks for persons, addresses and the like, from the generator that
made a seventh of its training; another one made the rest, YAML of any shape, in the last four stages often hard in
one thing: its shape, its depth, its numbers, its signs. `newcomers_yaml` asks for what no generator made: 200 documents
written by hand ([training/evaluation/newcomers_yaml](../training/evaluation/newcomers_yaml)), such as compose files,
CI workflows, Kubernetes manifests, people, prose and numbers, of 3 to 60 lines and in a dozen languages, and 24 with
anchors, tags and the like, which are to be refused by name. The second score is what to expect of your own YAML.
`exact` is right to the last character; `guided` answers are held to JSON by a grammar, as `response_format` does.

The aims were 95 % exact for instruct on generated documents and 90 % on newcomers' ones, 95 % right for chat, and a
loss at positions 60,000 to 65,536 no worse than at 1,000 to 2,000 for the storywriter; the scores below say what was
reached.

| model | task | steps | tokens | minutes | tokens/s |
|---|---|---|---|---|---|
"""


def write_docs(work: Path, docs: Path) -> None:
    """Write docs/tiny.md from what the runs measured. What it says of stages that are not there, it goes on saying.

    Where only a stage's `scores.json` is there, as of a model scored anew, its section says those tasks' scores.
    """
    page = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    rows, sections = [], []
    for name, task in _STAGES.items():
        scored = _scored(name, work / name / "scores.json")
        if not all((work / name / file).is_file() for file in ("run.json", "metrics.jsonl", f"model/{MANIFEST}")):
            rows += re.findall(rf"^\| `{name}` \|.*\n", page, re.MULTILINE)
            kept = re.findall(rf"^\n## {name}\n.*?(?=^\n## |\Z)", page, re.MULTILINE | re.DOTALL)
            sections += [_without(_tasks(work / name / "scores.json"), section) + scored for section in kept]
            continue
        run = Run.read(work / name / "run.json")
        lines = (work / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        last = steps[-1]
        tokens, minutes = last["tokens"] / 1e6, last["seconds"] / 60
        speeds = sorted(step["tokens_per_s"] for step in steps if "tokens_per_s" in step)
        fast = speeds[len(speeds) * 9 // 10]
        rows.append(f"| `{name}` | {task} | {last['step']} | {tokens:.1f} M | {minutes:.1f} | {fast:,.0f} |\n")
        sections.append(_section(name, run, last) + scored)
    shape = recipes.TINY_SHAPE
    head = _HEAD.format(n_parameters=_n_parameters(), **shape)
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(head + "".join(rows) + _MEASURED + "".join(sections), encoding="utf-8")


_MEASURED = """
The minutes are of training, without the scoring, as they passed beside whatever else ran; tokens/s are those of the
fastest tenth of the steps. Matrix products are in bfloat16. Two hours for all stages was an aim, which they miss.
Those below 11,000 tokens/s were made before attention of training ran in C, and were not made again. Some steps of
each with it, on the same cores: 18,000 to 22,100 tokens/s, the storywriter 7,100. At those speeds all stages would
take 3.8 hours, of which the instruct model's take 3.6.
"""
_SHOWN = {"newcomers_yaml": 6}  # failures of a task, else two
_OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon"}
_STAGES = {  # in the order they are trained
    "mpt-tiny-copying": "first stage of the base: short copies",
    "mpt-tiny": "continues text",
    "mpt-tiny-instruct-first": "first stage: short YAML to JSON",
    "mpt-tiny-instruct-second": "second stage: documents of up to 24 values",
    "mpt-tiny-instruct-third": "third stage: up to 44 values, hard in one thing each",
    "mpt-tiny-instruct-fourth": "fourth stage: the same with longer ones, at a falling rate",
    "mpt-tiny-instruct-fifth": "fifth stage: more that end deep down, amounts, backslashes",
    "mpt-tiny-instruct": "last stage: decimals, and more that end deep down",
    "mpt-tiny-chat-first": "first stage: short conversations",
    "mpt-tiny-chat": "a short conversation, and calls of two functions",
    "mpt-tiny-storywriter": "prose at 65,536 tokens",
}


def _n_parameters() -> int:
    from mpt.config import MPTConfig
    from mpt.model import MPTLanguageModel

    with torch.device("meta"):
        return sum(p.numel() for p in MPTLanguageModel.of(MPTConfig(**recipes.TINY_SHAPE)).parameters())


def _section(name: str, run: Run, last: dict[str, Any]) -> str:
    betas, today = f"betas {run.betas[0]} and {run.betas[1]}", datetime.date.today().isoformat()
    return (
        f"\n## {name}\n\n"
        f"Data `{run.data}`, {run.steps} steps of {run.global_batch} documents packed into sequences of "
        f"{run.max_seq_len:,}; {_OPTIMIZERS[run.optimizer]}, lr {run.lr}, {betas}, {run.schedule} "
        f"schedule after {run.warmup_steps} steps, clip {run.clip}, seed {run.seed}. "
        f"Last loss {last['loss']:.3f}. Made on {today} on {os.cpu_count()} cores "
        f"({platform.machine()}, torch {torch.__version__.partition('+')[0]}).{_mean_in_words(name)}\n\n"
    )


def _mean_in_words(name: str) -> str:
    others = [f"`{stage}`" for stage in _MEANS.get(name, ()) if stage != name]
    return f" The model is the mean of its weights and those of {' and '.join(others)}." if others else ""


def _tasks(path: Path) -> tiny_tasks.Scores:
    """The scores in a file, by task; none where there is no file."""
    scores: tiny_tasks.Scores = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return scores


def _without(tasks: tiny_tasks.Scores, section: str) -> str:
    """A section less what it says of these tasks."""
    head, *parts = re.split(r"^(?=`train evaluate --model )", section, flags=re.MULTILINE)
    return head + "".join(part for part in parts if part.partition("--task ")[2].partition("`")[0] not in tasks)


def _scored(name: str, path: Path) -> str:
    """What a section says of the scores in a file; nothing where there is none."""
    lines = []
    for task, values in _tasks(path).items():
        lines.append(f"`train evaluate --model {name} --task {task}` ({values['seconds']:.0f} s):\n\n")
        lines += [f"- {key}: {_shown(value)}\n" for key, value in tiny_tasks.compact(values).items()]
        if "blog_answer" in values:
            lines.append(f"- the launch blog's example answers `{values['blog_answer']}`\n")
        if values.get("failures"):
            lines.append("\nWhat it got wrong, for example:\n\n")
            lines += [_failure(failure) for failure in values["failures"][: _SHOWN.get(task, 2)]]
        lines.append("\n")
    return "".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _failure(failure: dict[str, Any]) -> str:
    asked = failure["yaml"] if "yaml" in failure else "\n".join(failure["turns"])
    return f"```\n{asked}\n\nexpected: {failure['expected']}\nanswered: {failure['answer']}\n```\n"
