"""Documents by language: natural ones identified from their text, programming ones by their rows."""

import json
from pathlib import Path

import pytest

from mpt.catalog import resolve
from mpt.errors import UserError
from training.data import languages
from training.data.prepare import prepare

ENGLISH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
)
GERMAN = "Habe nun, ach! Philosophie, Juristerei und Medizin, und leider auch Theologie durchaus studiert, heiß bemüht."
FRENCH = (
    "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient si vite."
)


def jsonl(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_text_decides_and_not_its_field(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    assert [languages.identify(text) for text in (ENGLISH, GERMAN, FRENCH)] == ["en", "de", "fr"]
    rows = [{"text": text, "language": "en"} for text in (ENGLISH, GERMAN, FRENCH)] + [
        {"text": ENGLISH, "language": "de"}
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    found = prepare([source], tmp_path / "out", resolve("mpt-tiny"), 16, language="en")
    assert (found.n_kept, found.dropped) == (2, {"in another language": 2})
    with pytest.raises(UserError, match="any, "):
        prepare([source], tmp_path / "other", resolve("mpt-tiny"), 16, language="klingon")
    assert not (tmp_path / "other").exists()


def test_the_blogs_rules_are_about_english(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    german = " ".join([*(f"wort{n}" for n in range(50)), *GERMAN.replace(",", "").replace("!", "").split() * 20])
    source = jsonl(tmp_path / "a.jsonl", [{"text": german}, {"text": german + " und"}])
    for language, dropped in ((None, {"in another language": 2}), ("de", {}), ("any", {})):
        out = tmp_path / f"{language}"
        if dropped:
            with pytest.raises(UserError, match="not one sample"):
                prepare([source], out, resolve("mpt-tiny"), 16, quality="mc4", language=language)
        else:
            assert prepare([source], out, resolve("mpt-tiny"), 16, quality="mc4", language=language).dropped == dropped


def test_the_stacks_eighteen_are_kept(tmp_path: Path) -> None:
    assert len(languages.THE_STACK) == 18
    rows = [
        {"content": "print(1)\n" * 9, "lang": name} for name in ("Python", "c-sharp", "TeX", "JavaScript", "FORTRAN")
    ]
    rows.append({"content": "nothing said\n" * 9})
    source = jsonl(tmp_path / "a.jsonl", rows)
    found = prepare([source], tmp_path / "out", resolve("mpt-tiny"), 16, code="mpt", text_key="content")
    assert (found.n_kept, found.dropped) == (4, {"in another code language": 2})
    found = prepare([source], tmp_path / "two", resolve("mpt-tiny"), 16, code="JavaScript,C#", text_key="content")
    assert found.n_kept == 2
    with pytest.raises(UserError, match="--code"):
        prepare([source], tmp_path / "three", resolve("mpt-tiny"), 16, code=" ,", text_key="content")
