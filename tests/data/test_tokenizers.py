"""Tokenizers: lossless on any text, streaming, saved and loaded, bits per byte."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.data import BPETokenizer, ByteTokenizer, load_text, load_tokenizer
from manyheads.data.tokenizers import Tokenizer, bpe
from manyheads.errors import MissingExtraError

TEXT = load_text("builtin:python", max_bytes=200_000).data.decode()


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    return BPETokenizer.train(TEXT, vocab_size=600, specials=("<end>", "<pad>"))


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer(specials=("<end>", "<pad>"))
    return request.getfixturevalue("trained")


TEXTS = st.text() | st.text("ab \n\t\r'é€😀<end>1").map(lambda t: t + "<end>")


@given(text=TEXTS)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert torch.equal(ids, tokenizer.encode(text.encode()))
    raw = torch.frombuffer(bytearray(text.encode() or b"x"), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(raw[: len(text.encode())]), ids)
    assert tokenizer.count_bytes(ids) == len(text.encode())
    # Text that reads like a special token is text.
    assert not set(tokenizer.specials.values()) & set(ids.tolist())


@given(data=st.data())
def test_streaming_equals_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)
    ids = data.draw(any_ids | TEXTS.map(lambda t: tokenizer.encode(t).tolist()))
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(b) for b in "a€".encode()] == ["a", "", "", "€"]
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(torch.tensor([[104], [105]])) == "hi"


def test_specials(tokenizer: Tokenizer) -> None:
    end = tokenizer.special("<end>")
    assert tokenizer.vocab_size - 2 == end
    assert tokenizer.decode([*tokenizer.encode("a").tolist(), end]) == "a"
    with pytest.raises(ValueError, match="did you mean '<end>'"):
        tokenizer.special("<eend>")
    with pytest.raises(ValueError, match="a name of its own"):
        ByteTokenizer(specials=("<a>", "<a>"))


@pytest.mark.parametrize("number", [-1, 10_000])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, number: int) -> None:
    with pytest.raises(ValueError, match=f"token id {number} is outside"):
        tokenizer.decode([1, number])


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert type(tokenizer).load(path).specials == again.specials == tokenizer.specials
    sample = "def f(x):\n    return 'é' <end>"
    assert torch.equal(again.encode(sample), tokenizer.encode(sample))
    assert torch.equal(again.token_bytes, tokenizer.token_bytes)


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"kind": "word"}', '{"model": {"type": "Unigram"}}']
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="token"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"no byte tokenizer|no readable|no JSON object"):
        ByteTokenizer.load(path)


def test_a_text_tensor_must_be_bytes() -> None:
    with pytest.raises(ValueError, match="give uint8 bytes"):
        ByteTokenizer().encode(torch.arange(3))


def test_byte_ids_can_stay_small() -> None:
    ids = ByteTokenizer().encode("hi", dtype=torch.uint8)
    assert ids.dtype == torch.uint8
    assert ids.tolist() == [104, 105]


def test_bits_per_byte_of_a_uniform_guess(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT[:5000])
    nats = len(ids) * math.log(tokenizer.vocab_size)
    expected = len(ids) * math.log2(tokenizer.vocab_size) / len(TEXT[:5000].encode())
    # Targets that are not scored bring neither loss nor bytes.
    targets = torch.cat([torch.full((7,), -100), ids])
    assert tokenizer.bits_per_byte(nats, targets) == pytest.approx(expected, rel=1e-12)
    assert tokenizer.bytes_per_token(targets) == pytest.approx(len(TEXT[:5000].encode()) / len(ids))
    assert math.isnan(tokenizer.bits_per_byte(1.0, torch.full((3,), -100)))


def test_bpe_is_shorter_than_bytes_and_full(trained: BPETokenizer) -> None:
    assert trained.vocab_size == 600
    assert trained.bytes_per_token(trained.encode(TEXT)) > 1.5
    assert int(trained.token_bytes.max()) > 4


def test_long_texts_are_cut_where_no_token_is(trained: BPETokenizer, monkeypatch) -> None:
    whole = trained._model.encode(TEXT, add_special_tokens=False).ids
    monkeypatch.setattr(bpe, "_CHUNK", 501)
    pieces = list(bpe._chunks(TEXT))
    assert len(pieces) > 100
    assert "".join(pieces) == TEXT
    assert trained.encode(TEXT).tolist() == whole
    monkeypatch.setattr(bpe, "_CHUNK", 5)
    for blank in ("a \n\n  b", "x\n \n\ty", "\r\n\r\n z", "é  \n€ "):
        text = blank * 9
        spaced = BPETokenizer.train(text, vocab_size=300)
        whole = spaced._model.encode(text, add_special_tokens=False).ids
        assert spaced.encode(text).tolist() == whole, blank


def test_the_saved_bpe_opens_in_its_own_package(trained: BPETokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Model

    trained.save(tmp_path / "tokenizer.json")
    model = Model.from_file(str(tmp_path / "tokenizer.json"))
    assert model.encode("import os").ids == trained.encode("import os").tolist()
    assert model.decode(model.encode("héllo").ids) == "héllo"


def test_bpe_training_is_the_same_in_another_process(trained: BPETokenizer) -> None:
    code = (
        "from manyheads.data import BPETokenizer, load_text;"
        "text = load_text('builtin:python', max_bytes=200_000).data;"
        "b = BPETokenizer.train(text, vocab_size=600, specials=('<end>', '<pad>'));"
        "print(b.encode(text[:20_000]).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(trained.encode(TEXT.encode()[:20_000]).tolist())


def test_bpe_refuses_a_vocabulary_below_the_bytes() -> None:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    with pytest.raises(ValueError, match="use 257"):
        BPETokenizer.train("text", vocab_size=256, specials=("<end>",))


def test_bpe_without_its_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"manyheads\[train\]"):
        BPETokenizer.train("text")
