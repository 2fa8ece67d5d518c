"""SentencePiece's files, trained and read by `sentencepiece` itself: the same ids, the same text, whole or in parts."""

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conversion.verify import _TEXTS
from mpt.backends.torch_backend import TorchBackend
from mpt.config import MPTConfig
from mpt.engine.grammar import Grammars
from mpt.engine.request import Sampling
from mpt.errors import DamagedFile, UnsupportedTokenizer
from mpt.tokenizer import DetokenizeStream, Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.in_process import running_engine
from tests.mpt.engine.test_engine import collect, last, text_of

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while two quick hens watch.",
    "def area(width, height):\n    return width * height  # of the fence",
    "0123456789 / ABCDEFGHIJKLMNOPQRSTUVWXYZ < abcdefghijklmnopqrstuvwxyz > |",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich, 1234567890 Mal für 2,50 €",
    "Съешь ещё этих мягких французских булок, да выпей же чаю",
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "x": null, "y": true}',
]
MORE_TEXTS = (
    "<sep>ab<sep> c <sep>", "a<sep><sep>b", "</s>x <s> <unk> <0xE2><0x0A>", " ", "   ", " a", "a ", "\t \n",
    "ℌello ﬁne ① Ⅳ", "\u200bzero \ufeffwidth", "x\ty\r\nz\rw", "日本語 𝔘 ▁ ▁▁x", "e\u0301 \u00e9 한국어 ไทย",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A file as sentencepiece reads it, and as we do."""

    file: Path
    theirs: sentencepiece.SentencePieceProcessor
    ours: Tokenizer


def train(folder: Path, kind: str, name: str = "tokenizer.model", **options: object) -> Pair:
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "trained"),
        model_type=kind,
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (folder / "trained.vocab").unlink()
    file = (folder / "trained.model").rename(folder / name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return Pair(file, theirs, Tokenizer.from_folder(folder))


OPTIONS = {
    "as Llama": {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "as code models": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["<sep>"],
    },
    "by default": {},
    "nfkc, bytes": {"normalization_rule_name": "nfkc", "byte_fallback": True, "user_defined_symbols": ["<sep>"]},
    "case folding": {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": False},
    "other control symbols": {
        "unk_piece": "<|unk|>",
        "eos_piece": "<|endoftext|>",
        "bos_id": -1,
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
}


@pytest.fixture(scope="module", params=[(kind, name) for kind in ("bpe", "unigram") for name in OPTIONS], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, name = request.param
    file = "spiece.model" if kind == "unigram" else "tokenizer.model"
    return train(tmp_path_factory.mktemp("sentencepiece"), kind, file, **OPTIONS[name])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return train(tmp_path_factory.mktemp("llama"), "bpe", **OPTIONS["as Llama"])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = DetokenizeStream(tokenizer)
    return "".join(stream.push(i) for i in ids) + stream.flush()


@pytest.mark.parametrize("text", [*_TEXTS, *MORE_TEXTS])
def test_ids_are_sentencepieces_own(pair: Pair, text: str) -> None:
    assert pair.ours.encode(text) == pair.theirs.encode(text)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.one_of(st.sampled_from([*"aehl .<s>/\n", "</s>", "é", "🙂"]), st.text(max_size=3))).map("".join)
)
def test_ids_of_any_text_are_sentencepieces_own(llama: Pair, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert llama.ours.encode(text) == llama.theirs.encode(text)
    assert llama.ours.decode(llama.ours.encode(text)) == text


def test_text_is_sentencepieces_own_at_every_split(pair: Pair) -> None:
    draw = random.Random(5)
    for text in (*_TEXTS, *MORE_TEXTS):
        ids = [i for i in pair.theirs.encode(text) if i != pair.theirs.unk_id()]
        for end in range(len(ids) + 1):
            assert pair.ours.decode(ids[:end]) == streamed(pair.ours, ids[:end]) == pair.theirs.decode(ids[:end])
    pieces = [
        i
        for i in range(pair.theirs.get_piece_size())
        if i not in pair.ours.special_ids and pair.theirs.id_to_piece(i) != "<0x20>"  # no space that was added
    ]
    for _ in range(200):
        ids = draw.choices(pieces, k=draw.randrange(12))
        assert streamed(pair.ours, ids) == pair.ours.decode(ids) == pair.theirs.decode(ids)


def test_special_ids_and_the_end_are_the_files(pair: Pair) -> None:
    pieces = range(pair.theirs.get_piece_size())
    assert pair.ours.special_ids == {i for i in pieces if pair.theirs.is_control(i) or pair.theirs.is_unknown(i)}
    assert pair.ours.eos_id == pair.theirs.eos_id()
    assert pair.ours.vocab_size == len(pieces)


def test_text_never_becomes_a_control_token(pair: Pair) -> None:
    for special in pair.ours.special_ids - {pair.theirs.unk_id()}:
        token = pair.theirs.id_to_piece(special)
        for text in (token, f"a{token}b", f"{token}{token}", f" {token}\n"):
            for is_continuation in (False, True):
                assert special not in pair.ours.encode(text, is_continuation=is_continuation)
        assert special in pair.ours.encode(token, allow_special=True)


def test_bytes_of_a_token(pair: Pair) -> None:
    for i in range(pair.theirs.get_piece_size()):
        piece = pair.theirs.id_to_piece(i)
        expected = bytes([int(piece[3:5], 16)]) if pair.theirs.is_byte(i) else piece.replace("▁", " ").encode()
        assert pair.ours.token_bytes(i) == expected
    assert pair.ours.token_bytes(pair.ours.vocab_size + 7) == b""


def test_a_character_of_several_byte_tokens_appears_with_its_last_byte(llama: Pair) -> None:
    byte = {llama.theirs.id_to_piece(i): i for i in range(llama.theirs.get_piece_size()) if llama.theirs.is_byte(i)}
    smile = [byte[f"<0x{b:02X}>"] for b in "🙂".encode()]
    stream = DetokenizeStream(llama.ours)
    assert [stream.push(i) for i in smile] == ["", "", "", "🙂"]
    word = llama.theirs.piece_to_id("▁the")
    assert [stream.push(i) for i in [*smile[:2], word]] == ["", "", "\ufffd\ufffd the"]
    assert [stream.push(i) for i in (byte["<0xFF>"], smile[0])] == ["\ufffd", ""]
    assert stream.flush() == "\ufffd"


def test_the_space_before_the_first_word_is_text_only_behind_other_text(llama: Pair) -> None:
    word = llama.theirs.piece_to_id("▁the")
    assert llama.ours.decode([word, word]) == "the the"
    assert DetokenizeStream(llama.ours, is_continuation=True).push(word) == " the"
    assert llama.ours.encode("the") == [word]
    assert llama.ours.encode(" the", is_continuation=True) == [word]
    assert "".join(llama.theirs.id_to_piece(i) for i in llama.ours.encode("the", is_continuation=True)) == "the"


def test_saved_as_tokenizer_json_it_is_the_same_here_and_in_transformers(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.end_ids, again.special_ids) == (pair.ours.end_ids, pair.ours.special_ids)
    for text in (*_TEXTS, *MORE_TEXTS):
        assert again.encode(text) == pair.theirs.encode(text)
        if not any(pair.theirs.id_to_piece(i) in text for i in pair.ours.special_ids):
            assert theirs(text, add_special_tokens=False)["input_ids"] == pair.theirs.encode(text)


LLAMA_DECODER = tokenizers.decoders.Sequence(
    [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
)


@pytest.mark.parametrize("prefix", ["Prepend and Replace", "Metaspace"])
def test_a_tokenizer_json_as_llamas(llama: Pair, prefix: str) -> None:
    """Both layouts that Llama's have had, decoded as `tokenizers` does; its U+FFFD for broken bytes are not ours."""
    theirs = tokenizers.Tokenizer.from_str(llama.ours.to_json())
    theirs.decoder = LLAMA_DECODER
    if prefix == "Metaspace":
        theirs.normalizer = None
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        theirs.normalizer = tokenizers.normalizers.Sequence(parts)
    ours = Tokenizer.from_json(theirs.to_str(), "the test's own")
    assert ours.eos_id == llama.theirs.eos_id()
    for text in (*_TEXTS, *MORE_TEXTS):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == ids
        if prefix != "Metaspace" or not text.startswith((" ", "▁")):  # where it adds no space of its own
            assert ours.encode(text) == llama.theirs.encode(text)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids)
    assert ours.encode("the dog", is_continuation=True) == llama.ours.encode("the dog", is_continuation=True)


def test_merges_that_lead_to_a_control_token_do_not_make_one_of_text(llama: Pair) -> None:
    """Early conversions of Llama's file listed merges for `</s>` too."""
    described = json.loads(llama.ours.to_json())
    described["model"]["vocab"] |= {"</": llama.ours.vocab_size, "s>": llama.ours.vocab_size + 1}
    described["model"]["merges"][:0] = [["</", "s>"], ["<", "/"], ["s", ">"]]
    end = llama.theirs.eos_id()
    careless = tokenizers.Tokenizer.from_str(json.dumps(described))
    careless.encode_special_tokens = True
    assert end in careless.encode("a</s>").ids  # the trap is one
    ours = Tokenizer.from_json(json.dumps(described), "the test's own")
    for text in ("</s>", "a</s>b"):
        assert end not in ours.encode(text)
        assert end not in ours.encode(text, is_continuation=True)
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("</s>", allow_special=True) == [end]


@pytest.fixture(scope="module")
def llama_model(llama: Pair) -> MPTForCausalLM:
    torch.manual_seed(0)
    return MPTForCausalLM(
        MPTConfig(d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=512, vocab_size=1024)
    )


@pytest.mark.parametrize("seed", range(3))
async def test_a_json_grammar_is_followed(llama: Pair, llama_model: MPTForCausalLM, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "tag": {"enum": ["naïve", "日本", "the dog"]}},
        "required": ["name", "tag"],
        "additionalProperties": False,
    }
    grammar = await Grammars(llama.ours).get("json", schema)
    sampling = Sampling(max_tokens=300, temperature=1.0, seed=seed, grammar=grammar)
    with running_engine(TorchBackend(llama_model), llama.ours, context_length=512, kv_bytes=1 << 24) as engine:
        events = await collect(engine, llama.ours.encode("Write it: "), sampling)
    assert last(events).finish_reason == "stop"
    jsonschema.validate(json.loads(text_of(events)), schema)


async def test_an_answer_begins_with_a_space_behind_text_and_without_one_at_the_beginning(
    llama: Pair, llama_model: MPTForCausalLM
) -> None:
    sampling = Sampling(max_tokens=2, temperature=0, logit_bias={llama.theirs.piece_to_id("▁the"): 100.0})
    with running_engine(TorchBackend(llama_model), llama.ours, context_length=512, kv_bytes=1 << 24) as engine:
        assert text_of(await collect(engine, llama.ours.encode("over"), sampling)) == " the the"
        assert text_of(await collect(engine, [llama.ours.eos_id], sampling)) == "the the"


def forged(**fields: bytes) -> bytes:
    """A file of three pieces; fields: raw bytes behind them."""
    pieces = [("<unk>", 2), ("</s>", 3), ("a", 1)]
    body = b""
    for text, kind in pieces:
        piece = (
            b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", -1.0) + b"\x18" + bytes([kind])
        )
        body += b"\x0a" + bytes([len(piece)]) + piece
    return body + b"".join(fields.values())


def damaged() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "no protobuf", b"PK\x03\x04 a zip archive"
    yield "truncated", forged()[:-3]
    yield "a length beyond the end", forged(trainer=b"\x12\xff\xff\xff\xff\x0f")
    yield "an endless number", forged(trainer=b"\x12" + b"\xff" * 12)
    yield "a piece twice", forged(again=forged())
    yield "text that is not UTF-8", b"\x0a\x04\x0a\x02\xff\xfe"
    yield "a number where the settings belong", forged(trainer=b"\x10\x01")
    yield "bytes missing for byte fallback", forged(trainer=b"\x12\x05\x18\x02\x98\x02\x01")
    yield "a charsmap that is none", forged(trainer=b"\x12\x02\x18\x02", rules=b"\x1a\x04\x12\x02\xff\xff")


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damaged()])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_kind_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTokenizer, match="CHAR"):
        train(tmp_path, "char")
