"""Scores are computed from what the model really says, whatever the batch."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mpt
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.manifest import read_manifest, verify_manifest, write_manifest
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import loop, tiny
from training.corpora import chat, tool_talks, yaml_json
from training.evaluation import tiny_tasks
from training.run import Run

SHAPE = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 384, "max_seq_len": 64, "no_bias": True}


@pytest.fixture
def model() -> MPTForCausalLM:
    torch.manual_seed(0)
    return MPTForCausalLM(MPTConfig(**SHAPE, attn_config={"alibi": True})).eval()


def test_batched_greedy_equals_the_naive_loop(model: MPTForCausalLM) -> None:
    torch.manual_seed(1)
    prompts = [torch.randint(384, (n,)).tolist() for n in (3, 17, 9, 40, 1, 17) for _ in range(8)]
    end_ids = tuple(range(20))
    found = tiny_tasks.greedy(model, prompts, 15, end_ids)
    expected = [mpt.generate(model, prompt, 15, end_ids=end_ids) for prompt in prompts]
    assert found == expected
    assert len({len(answer) for answer in expected}) > 1  # some ended early, some did not


def test_token_losses_read_in_pieces_equal_one_forward(model: MPTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tasks, "_CHUNK", 7)
    ids = torch.randint(384, (50,))
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
    torch.testing.assert_close(tiny_tasks.token_losses(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_copies_the_answers_scores_one_and_a_mute_one_zero(
    model: MPTForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is replaced by an oracle that reads the prompt's YAML with pyyaml, and by one that says nothing."""
    import yaml

    def oracle(model: object, prompts: list[list[int]], limit: int, end_ids: object) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            text = tokenizer.decode(prompt).partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
            candidates = [text.replace("```yaml\n", "").replace("```", "").strip("\n")]
            for template in yaml_json.INSTRUCTIONS:
                head, tail = template.split("{yaml}")
                if text.startswith(head) and text.endswith(tail):
                    inner = text[len(head) : len(text) - len(tail)]
                    candidates.append(inner.replace("```yaml\n", "").replace("```", "").strip("\n"))
            value = yaml.safe_load(min(candidates, key=len).replace("street:123", "street: 123"))
            answers.append([*tokenizer.encode(json.dumps(value, ensure_ascii=False)), tokenizer.eos_id])
        return answers

    monkeypatch.setattr(tiny_tasks, "greedy", oracle)
    scores = tiny_tasks.yaml_to_json(model, tokenizer, "instruct", n_documents=40)
    for shape in ("blog_shape", "every_shape"):
        assert (scores[shape]["exact"], scores[shape]["equal_values"]) == (1.0, 1.0)
    assert scores["blog_example"] is True
    monkeypatch.setattr(tiny_tasks, "greedy", lambda model, prompts, *_: [[] for _ in prompts])
    mute = tiny_tasks.yaml_to_json(model, tokenizer, "instruct", n_documents=20)
    assert (mute["every_shape"]["exact"], mute["blog_shape"]["equal_values"], mute["blog_example"]) == (0.0, 0.0, False)


def test_tool_scores_are_those_of_what_was_said(
    model: MPTForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parrot that always says the same is right exactly where that is expected; silence never is."""
    end = tokenizer.special_id("<|im_end|>")
    said = [*tokenizer.encode(chat.UNKNOWN), end]
    monkeypatch.setattr(tiny_tasks, "greedy", lambda model, prompts, *_: [said for _ in prompts])
    scores = tiny_tasks.tool_turns(model, tokenizer, "chatml", n_talks=20)
    talks = [tool_talks.conversation(random.Random(f"held out/tools/{n}"), held_out=True, n_turns=3) for n in range(20)]
    expected = [talk.messages[at]["content"] == chat.UNKNOWN for talk in talks for at in talk.kinds]
    assert sum(score["right"] * score["cases"] for score in scores.values() if "cases" in score) == sum(expected) > 0
    assert sum(score["cases"] for score in scores.values() if "cases" in score) == len(expected)
    assert scores["call"]["right"] == 0
    monkeypatch.setattr(tiny_tasks, "greedy", lambda model, prompts, *_: [[] for _ in prompts])
    mute = tiny_tasks.tool_turns(model, tokenizer, "chatml", n_talks=5)
    assert all(score["right"] == 0 for score in mute.values() if "cases" in score)


def test_the_page_keeps_what_was_not_made_again(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "tiny.md"
    copy = tmp_path / "tiny.md"
    shutil.copy(page, copy)
    tiny.write_docs(tmp_path / "no runs", copy)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_the_page_says_new_scores_of_a_model_that_was_not_made_again(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "tiny.md"
    copy = tmp_path / "tiny.md"
    shutil.copy(page, copy)
    failures = [{"yaml": f"n: {n}", "expected": f'{{"n": {n}}}', "answer": "{}"} for n in range(8)]
    rates = {"documents": 8, "exact": 0.0, "equal_values": 0.25}
    scores = {"newcomers_yaml": {"numbers": rates, "failures": failures, "seconds": 3.2}}
    (tmp_path / "work" / "mpt-tiny-instruct").mkdir(parents=True)
    tiny_tasks.write(scores, tmp_path / "work" / "mpt-tiny-instruct" / "scores.json")
    tiny.write_docs(tmp_path / "work", copy)
    before, after = page.read_text(encoding="utf-8"), copy.read_text(encoding="utf-8")
    following = "\n## mpt-tiny-chat-first\n"
    section = before.partition("\n## mpt-tiny-instruct\n")[2].partition(following)[0]
    old_task = "`train evaluate --model mpt-tiny-instruct --task yaml_to_json`"
    kept = section.partition(old_task)[0] + old_task + section.partition(old_task)[2].partition("`train evaluate")[0]
    new_section = after.partition("\n## mpt-tiny-instruct\n")[2].partition(following)[0]
    assert new_section.startswith(f"{kept}`train evaluate --model mpt-tiny-instruct --task newcomers_yaml` (3 s):\n")
    assert new_section.count("--task newcomers_yaml") == 1
    assert after.replace(new_section, section) == before
    assert "- numbers: documents 8, exact 0, equal_values 0.25\n" in after
    assert 'n: 5\n\nexpected: {"n": 5}\nanswered: {}\n' in after
    assert "n: 6" not in after


def test_an_unknown_task_is_refused(small_run: Run) -> None:
    folder = loop.fit(small_run)
    with pytest.raises(UserError, match="no task `poetry`; known: yaml_to_json"):
        tiny_tasks.evaluate(str(folder), ["poetry"])


def test_a_packaged_model_loads_and_holds_its_scores(small_run: Run, tmp_path: Path) -> None:
    folder = loop.fit(small_run)
    target = tmp_path / "packaged" / "small"
    for score in (0.5, 0.75):  # a better version replaces the old one
        tiny.package(folder, {"yaml_to_json": {"exact": score, "failures": ["x"], "seconds": 1.0}}, target)
    manifest = read_manifest(target)
    assert manifest is not None and manifest["scores"] == {"yaml_to_json": {"exact": 0.75}}
    assert manifest["recipe"]["out"] == f"runs/tiny/{Path(small_run.out).name}"  # not where this machine has it
    found, expected = mpt.load(target).state_dict(), mpt.load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [path.name for path in target.parent.iterdir()] == ["small"]


def test_a_model_of_two_stages_is_the_mean_of_their_weights(tmp_path: Path) -> None:
    """Counted by hand: float32 sums of bfloat16 numbers, rounded once."""
    stages = []
    for name, values in (("early", [1.0, 3.0, 1.0]), ("late", [2.0, -3.0, 1.0078125])):
        stages.append(tmp_path / name / "model")
        stages[-1].mkdir(parents=True)
        (stages[-1] / "config.json").write_text(f'"{name}"')
        save_file({"w": torch.tensor(values, dtype=torch.bfloat16)}, stages[-1] / "model.safetensors")
        write_manifest(stages[-1], {"name": name})
    made = tiny.mean(stages, tmp_path / "mean")
    assert load_file(made / "model.safetensors")["w"].tolist() == [1.5, 0.0, 1.0]  # half way goes to the even one
    assert (made / "config.json").read_text() == '"late"'
    manifest = read_manifest(made)
    assert manifest is not None
    assert (manifest["name"], manifest["mean_of"]) == ("late", ["runs/tiny/early/model", "runs/tiny/late/model"])
    verify_manifest(made)
    (made / "config.json").write_text("kept")
    assert (tiny.mean(stages, made) / "config.json").read_text() == "kept"  # a stage that is finished
