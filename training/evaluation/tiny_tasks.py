"""Scores checkpoints on held-out cases: exact YAML to JSON, exact chat answers, loss by position, planted passkeys.

Held out are the seeds, and every invented name: none of them is ever generated for training. `newcomers_yaml` asks for
documents that no generator made. Generation is greedy, in left-padded batches through transformers' cache.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

import mpt.checkpoint
from mpt.catalog import describe, resolve
from mpt.checkpoint_text import open_tokenizer
from mpt.engine.grammar import Grammar, Grammars
from mpt.errors import UserError
from mpt.files import write_whole
from mpt.model import MPTLanguageModel
from mpt.packed.layers import as_it_lies
from mpt.prompts import Message, PromptStyle, encode_chat, encode_instruct
from mpt.sampling import ban_others
from mpt.tokenizer import Tokenizer
from mpt.tools import as_text
from training.corpora import chat, novels, tool_talks, yaml_json
from training.evaluation import newcomers

Scores = dict[str, Any]
_SEED = "held out"
_ROWS = 25  # generated together
_CHUNK = 4096  # tokens of a long prompt read at a time


def evaluate(
    model_name: str, tasks: Sequence[str] = (), report: Callable[[str, int, int], None] = lambda name, n, of: None
) -> Scores:
    """Scores of a checkpoint on these tasks, by default those its prompt style is made for.

    report: called with each task's name, its number and how many there are, before it is run. Raises UserError.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"no task `{unknown[0]}`; known: {', '.join(TASKS)}")
    folder = resolve(model_name)
    model = mpt.checkpoint.load_for_engine(folder, pack=as_it_lies)
    tokenizer = open_tokenizer(folder, model.config.vocab_size)
    entry = describe(folder)
    if not tasks:
        by_style: dict[PromptStyle, tuple[str, ...]] = {
            "instruct": ("yaml_to_json", "newcomers_yaml"),
            "chatml": ("chat", "tools"),
        }
        is_long = entry.context_length > 8192
        tasks = by_style.get(entry.prompt_style, ("positions", "passkey") if is_long else ("novel",))
    scores: Scores = {}
    for n, task in enumerate(tasks, 1):
        report(task, n, len(tasks))
        started = time.monotonic()
        scores[task] = TASKS[task](model, tokenizer, entry.prompt_style)
        scores[task]["seconds"] = round(time.monotonic() - started, 1)
    return scores


def yaml_to_json(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle, n_documents: int = 200) -> Scores:
    """How often the answer is the document's JSON: as values, and character for character.

    Twice n_documents: in the shape of the launch blog's example (name, age, address, up to two entries more), and of
    every shape the generator makes, up to maps nested four deep and lists of maps.
    """
    result: Scores = {}
    failures: list[dict[str, str]] = []
    for shape, like_the_blog in (("blog_shape", True), ("every_shape", False)):
        pairs, prompts = [], []
        for number in range(n_documents):
            rng = random.Random(f"{_SEED}/{'blog' if like_the_blog else 'yaml'}/{number}")
            pair = yaml_json.pair(rng, held_out=True, like_the_blog=like_the_blog)
            pairs.append(pair)
            prompts.append(encode_instruct(tokenizer, yaml_json.instruction(rng, pair.yaml)))
        answers = [tokenizer.decode(ids) for ids in greedy(model, prompts, 512, tokenizer.end_ids)]
        exact = [answer == pair.json for answer, pair in zip(answers, pairs, strict=True)]
        equal = [_parsed(answer) == pair.value for answer, pair in zip(answers, pairs, strict=True)]
        wrong = [
            {"yaml": pair.yaml, "expected": pair.json, "answer": answer}
            for pair, answer, good in zip(pairs, answers, exact, strict=True)
            if not good
        ]
        failures += wrong[:3]
        result[shape] = {
            "documents": n_documents,
            "exact": sum(exact) / n_documents,
            "equal_values": sum(equal) / n_documents,
        }
    blog = encode_instruct(tokenizer, yaml_json.BLOG_INSTRUCTION)
    answer = tokenizer.decode(greedy(model, [blog], 256, tokenizer.end_ids)[0])
    is_right = _parsed(answer) == yaml_json.BLOG_VALUE
    return {**result, "blog_example": is_right, "blog_answer": answer, "failures": failures}


def newcomers_yaml(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle) -> Scores:
    """How often the answer to a newcomer's document is its JSON, by its shape: as values, and to the last character.

    `every shape, guided` counts answers that a grammar holds to JSON, objects and arrays, as `response_format` does.
    `refused` counts the documents that are refused in the words of `newcomers.REFUSALS`.
    """
    documents, refused = newcomers.documents(), newcomers.refused()
    free = _newcomers_answers(model, tokenizer, (*documents, *refused))
    guided = _newcomers_answers(model, tokenizer, documents, asyncio.run(_any_json(tokenizer)))
    long = {d for d in documents if len(_newcomers_prompt(tokenizer, d)) + len(tokenizer.encode(d.answer)) > 1024}
    result: Scores = {}
    for shape in newcomers.SHAPES:
        result[shape] = _newcomers_rates(free, [document for document in documents if document.shape == shape])
    result["over 1,024 tokens"] = _newcomers_rates(free, [document for document in documents if document in long])
    result["every shape"] = _newcomers_rates(free, documents)
    result["every shape, guided"] = _newcomers_rates(guided, documents)
    result["refused"] = _newcomers_rates(free, refused)
    wrong = sorted((d for d in free if free[d] != d.answer), key=lambda document: len(document.yaml))
    n_before: Counter[str] = Counter()  # so that the first of every shape come first, the short ones before
    rounds = []
    for document in wrong:
        rounds.append((n_before[document.shape], document))
        n_before[document.shape] += 1
    rounds.sort(key=lambda pair: pair[0])
    failures = [{"yaml": d.yaml, "expected": d.answer, "answer": free[d]} for _, d in rounds]
    return {**result, "failures": failures}


def _newcomers_prompt(tokenizer: Tokenizer, document: newcomers.Document) -> list[int]:
    return encode_instruct(tokenizer, document.instruction)


def _newcomers_answers(
    model: MPTLanguageModel,
    tokenizer: Tokenizer,
    documents: Sequence[newcomers.Document],
    grammar: Grammar | None = None,
) -> dict[newcomers.Document, str]:
    """The answers of documents, cut where one is longer than it and all those beside it may be."""
    n_tokens = {document: len(tokenizer.encode(document.answer)) for document in documents}
    order = sorted(documents, key=lambda document: n_tokens[document])
    answers = {}
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        prompts = [_newcomers_prompt(tokenizer, document) for document in rows]
        longest = n_tokens[rows[-1]] + 1  # one more to end it
        for document, ids in zip(rows, greedy(model, prompts, longest, tokenizer.end_ids, grammar), strict=True):
            answers[document] = tokenizer.decode(ids)
    return answers


def _newcomers_rates(
    answers: dict[newcomers.Document, str], documents: Sequence[newcomers.Document]
) -> dict[str, int | float]:
    exact = sum(answers[document] == document.answer for document in documents)
    equal = sum(newcomers.has_equal_values(answers[document], document.answer) for document in documents)
    n = len(documents)
    return {"documents": n, "exact": exact / max(n, 1), "equal_values": equal / max(n, 1)}


async def _any_json(tokenizer: Tokenizer) -> Grammar:
    return await Grammars(tokenizer).get("json", {"type": ["object", "array"]})


def chat_turns(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle, n_talks: int = 50) -> Scores:
    """How often the answer to a turn is right; the model goes on from its own answers, five turns long.

    Right is the expected text, ended by the model itself.
    """
    talks = [chat.conversation(random.Random(f"{_SEED}/chat/{n}"), held_out=True, n_turns=5) for n in range(n_talks)]
    said: list[list[str]] = [[] for _ in talks]
    n_right = n_ended = 0
    failures = []
    for turn in range(5):
        prompts = []
        for talk, answers in zip(talks, said, strict=True):
            messages = [Message(role="system", content=talk.system)] if talk.system else []
            for n, user in enumerate(talk.user_turns[: turn + 1]):
                messages.append(Message(role="user", content=user))
                if n < turn:
                    messages.append(Message(role="assistant", content=answers[n]))
            prompts.append(encode_chat(tokenizer, style, messages))
        for n, ids in enumerate(greedy(model, prompts, 64, tokenizer.end_ids)):
            answer = tokenizer.decode(ids)
            ended = bool(ids) and ids[-1] == tokenizer.special_id("<|im_end|>")
            right = ended and answer == talks[n].answers[turn]
            n_ended += ended
            n_right += right
            said[n].append(answer)
            if not right:
                failures.append(
                    {"turns": talks[n].user_turns[: turn + 1], "expected": talks[n].answers[turn], "answer": answer}
                )
    n_turns = 5 * n_talks
    return {"turns": n_turns, "right": n_right / n_turns, "ended": n_ended / n_turns, "failures": failures[:8]}


def tool_turns(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle, n_talks: int = 200) -> Scores:
    """How often an answer is right where functions are declared, by what is asked of it.

    Right is the expected text to the last character, name and arguments of every call included, ended by the model
    itself. The turns before are the right ones. The wordings of the questions are held out too.
    """
    cases: list[tuple[tool_talks.Kind, list[int], str, list[str]]] = []  # and prompt, answer, what was said before
    for n in range(n_talks):
        talk = tool_talks.conversation(random.Random(f"{_SEED}/tools/{n}"), held_out=True, n_turns=3)
        texts = [message["content"] for message in as_text(talk.messages, talk.tools)]
        for at, kind in talk.kinds.items():
            messages = talk.messages[:at]
            ids = encode_chat(tokenizer, style, messages, tools=talk.tools)
            (expected,) = as_text(talk.messages[at : at + 1])
            cases.append((kind, ids, expected["content"], texts[: len(as_text(messages, talk.tools))]))
    answers = greedy(model, [ids for _, ids, _, _ in cases], 160, tokenizer.end_ids)
    n_cases: Counter[tool_talks.Kind] = Counter()
    n_right: Counter[tool_talks.Kind] = Counter()
    failures = []
    for (kind, _, expected, before), ids in zip(cases, answers, strict=True):
        answer = tokenizer.decode(ids)
        n_cases[kind] += 1
        if bool(ids) and ids[-1] == tokenizer.special_id("<|im_end|>") and answer == expected:
            n_right[kind] += 1
        else:
            failures.append({"turns": before, "expected": expected, "answer": answer})
    scores: Scores = {kind: {"cases": n, "right": n_right[kind] / n} for kind, n in sorted(n_cases.items())}
    return {**scores, "failures": failures[:8]}


def novel_loss(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle) -> Scores:
    """Loss on the first 32 windows of 2,048 tokens of The Great Gatsby, per token and in bits per byte."""
    ids = tokenizer.encode(novels.held_out_text())[: 32 * 2048]
    windows = torch.tensor(ids).view(-1, 2048)
    losses = torch.cat([token_losses(model, row) for row in windows])
    n_bytes = len(tokenizer.decode(ids).encode())
    return {"loss": float(losses.mean()), "bits_per_byte": float(losses.sum()) / math.log(2) / n_bytes}


def position_losses(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle) -> Scores:
    """Loss by position in the first 65,536 tokens of The Great Gatsby, read in one piece."""
    ids = tokenizer.encode(novels.held_out_text())[:65536]
    losses = token_losses(model, torch.tensor(ids))
    ranges = ((1000, 2000), (4000, 8000), (16000, 32000), (32000, 60000), (60000, 65536))
    result: Scores = {f"{start}-{end}": float(losses[start:end].mean()) for start, end in ranges}
    # The same last tokens with only a short context show how much of the difference is the text itself.
    near = [token_losses(model, torch.tensor(ids[end - 2048 : end]))[-1024:] for end in range(61024, 65537, 1024)]
    result["60000-65536 with 1,024 to 2,048 tokens of context"] = float(torch.cat(near).mean())
    return result


def passkey(model: MPTLanguageModel, tokenizer: Tokenizer, style: PromptStyle) -> Scores:
    """How often five digits planted in The Great Gatsby are told back, by length of the prompt."""
    book = tokenizer.encode(novels.held_out_text())
    result: Scores = {}
    for label, length, n_trials in (("1k", 1024, 20), ("4k", 4096, 20), ("16k", 16384, 10), ("64k", 65536, 5)):
        n_right, depths = 0, []
        for trial in range(n_trials):
            rng = random.Random(f"{_SEED}/passkey/{length}/{trial}")
            ((name, digits),) = novels.passkeys(rng, 1)
            sentence = novels.passkey_sentence(name, digits)
            planted = tokenizer.encode(f"\n\n{sentence}\n\n")
            question = tokenizer.encode("\n\n" + sentence.split(digits)[0])
            room = length - len(planted) - len(question) - 8
            start = rng.randrange(len(book) - room + 1)
            place = int(room * (trial + 0.5) / n_trials)  # depths spread evenly over the prompt
            prompt = book[start : start + place] + planted + book[start + place : start + room] + question
            found = tokenizer.decode(greedy(model, [prompt], len(tokenizer.encode(digits)), ())[0])
            n_right += found == digits
            depths.append([round(place / room, 2), found == digits])
        result[label] = {"trials": n_trials, "rate": n_right / n_trials, "depths": depths}
    return result


TASKS: dict[str, Callable[[MPTLanguageModel, Tokenizer, PromptStyle], Scores]] = {
    "yaml_to_json": yaml_to_json,
    "newcomers_yaml": newcomers_yaml,
    "chat": chat_turns,
    "tools": tool_turns,
    "novel": novel_loss,
    "positions": position_losses,
    "passkey": passkey,
}


@torch.no_grad()  # not inference mode: see training/evaluation/scoring.py
def greedy(
    model: MPTLanguageModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end_ids: Collection[int],
    grammar: Grammar | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and with its end token, in the order of the prompts.

    grammar: what every continuation must be.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        batch = _greedy_batch(model, [prompts[n] for n in rows], max_new_tokens, end_ids, grammar)
        for n, ids in zip(rows, batch, strict=True):
            results[n] = ids
    return results


def _greedy_batch(
    model: MPTLanguageModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end_ids: Collection[int],
    grammar: Grammar | None,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = model.device
    ids, mask = ids.to(device), mask.to(device)
    cache = DynamicCache()
    for chunk, seen in _chunks(ids):
        logits = model(
            chunk, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    results: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    states = [grammar.begin() for _ in prompts] if grammar is not None else []
    for _ in range(max_new_tokens):
        for n in running if states else ():
            ban_others(logits[n], states[n].allowed(logits.shape[-1]))
        tokens = logits.argmax(-1)
        for n in list(running):
            results[n].append(int(tokens[n]))
            if states:
                states[n].take(results[n][-1])
            if results[n][-1] in end_ids:
                running.discard(n)
        if not running or len(results[min(running)]) == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        logits = model(
            tokens[:, None], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    return results


@torch.inference_mode()
def token_losses(model: MPTLanguageModel, ids: Tensor) -> Tensor:
    """The loss of predicting each token of a text from those before it, (T - 1,) float32."""
    device = model.device
    cache = DynamicCache()
    losses = []
    targets = ids[1:].to(device)
    for chunk, seen in _chunks(ids[None, :-1].to(device)):
        logits = model(chunk, past_key_values=cache, use_cache=True).logits[0]
        losses.append(F.cross_entropy(logits.float(), targets[seen - chunk.shape[1] : seen], reduction="none"))
    return torch.cat(losses).cpu()


def _chunks(ids: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Pieces of (B, T) ids that bound the memory of a long prompt, each with the number of tokens up to its end."""
    for start in range(0, ids.shape[1], _CHUNK):
        chunk = ids[:, start : start + _CHUNK]
        yield chunk, start + chunk.shape[1]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def compact(scores: Scores) -> Scores:
    """The numbers without examples of failures, as a manifest keeps them."""
    dropped = ("failures", "depths", "seconds", "blog_answer")
    return {
        key: compact(value) if isinstance(value, dict) else value for key, value in scores.items() if key not in dropped
    }


def write(scores: Scores, path: Path) -> None:
    write_whole(path, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
