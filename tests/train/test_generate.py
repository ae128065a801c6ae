"""Text comes out as it is made: whole characters, stop texts, seeds, constant memory, errors."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.cli import main
from manyheads.data import ByteTokenizer
from manyheads.layers.state import state_bytes
from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train.checkpoint import write_model
from manyheads.train.generate import continuation, load_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    folder = tmp_path / "run"
    folder.mkdir()
    write_model(MixerLM(MixerLMConfig(embed_dim=20, num_heads=2, mixers="gla*2")), folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


class Recites:
    """A model whose tokens are known."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompt, *, max_new_tokens, **options):
        for byte in self.data[:max_new_tokens]:
            yield torch.tensor([byte])


def recited(text: str, *stop: str, limit: int = 10**6) -> list[str]:
    model = Recites(text.encode())
    return list(continuation(model, ByteTokenizer(), "x", max_new_tokens=limit, stop=stop))


def generate(run: Path, *words: object) -> int:
    return main(["generate", str(run), *map(str, words)])


def test_the_text_is_that_of_the_model(run, capsys) -> None:
    words = ("--prompt", "def ", "--max-new-tokens", 40, "--seed", 5, "--top-k", 9)
    assert generate(run, *words) == 0
    first = capsys.readouterr().out
    model, tokenizer = load_run(run)
    ids = [
        int(t)
        for t in model.generate(
            tokenizer.encode("def ")[None], max_new_tokens=40, temperature=0.8, top_k=9,
            generator=torch.Generator().manual_seed(5),
        )
    ]  # fmt: skip
    assert first == tokenizer.decode(ids) + "\n"
    generate(run, *words)
    assert capsys.readouterr().out == first
    generate(run, *words[:-4], "--seed", 6)
    assert capsys.readouterr().out != first
    generate(run, *words, "--echo")
    assert capsys.readouterr().out == "def " + first


def test_greedy_needs_no_seed(run, capsys) -> None:
    outs = set()
    for seed in (1, 2):
        generate(run, "--prompt", "a", "--temperature", 0, "--max-new-tokens", 20, "--seed", seed)
        outs.add(capsys.readouterr().out)
    assert len(outs) == 1


def test_every_token_is_given_out_at_once(run) -> None:
    pieces, made = [], []
    model, tokenizer = load_run(run)
    step = model.step

    def watched(tokens, state):
        made.append(len(pieces))
        return step(tokens, state)

    model.step = watched
    for piece in continuation(model, tokenizer, "a", max_new_tokens=30, temperature=0):
        pieces.append(piece)
    assert made == sorted(made)
    ascii_only = all(len(p) == 1 for p in pieces) and len(pieces) == 30
    assert not ascii_only or made == list(range(1, 30))


def test_memory_does_not_grow(run) -> None:
    model, tokenizer = load_run(run)
    step, sizes = model.step, []

    def watched(tokens, state):
        out = step(tokens, state)
        sizes.append(state_bytes(out[1]))
        return out

    model.step = watched
    for _ in continuation(model, tokenizer, "a" * 50, max_new_tokens=300):
        pass
    assert len(sizes) == 299
    assert len(set(sizes)) == 1


def test_characters_are_not_cut() -> None:
    text = "naïve 🧮 日本\n"
    assert recited(text) == list(text)
    # The limit falls within the abacus: what is left is marked as broken.
    assert recited(text, limit=8) == [*"naïve ", "\ufffd"]


def test_stop_texts_are_not_given_out() -> None:
    assert "".join(recited("one two three", "two")) == "one "
    assert "".join(recited("one two three", "three", "two")) == "one "
    assert "".join(recited("one two three", "four")) == "one two three"
    assert recited("aab", "ab") == ["a"]
    # What may become a stop text waits, and comes when it did not.
    assert recited("a\nb", "\n\n") == ["a", "\nb"]
    assert "".join(recited("naïve", "ïv")) == "na"


@settings(deadline=None)
@given(
    st.text("abé", max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
)
def test_stopping_is_cutting_the_whole(text, stops) -> None:
    cut = min([text.find(s) for s in stops if s in text], default=len(text))
    # The first that is complete ends it, as a reader of the stream would see it.
    ends = [text.find(s) + len(s) for s in stops if s in text]
    got = "".join(recited(text, *stops))
    if not ends:
        assert got == text
    else:
        first = min(ends)
        assert got == text[: min(text.find(s) for s in stops if text[:first].find(s) >= 0)]
        assert len(got) >= cut
    assert not any(s in got for s in stops)


def test_stop_and_escapes_on_the_command_line(run, capsys, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(
        "manyheads.train.generate.continuation",
        lambda *a, **k: seen.update(k) or iter(()),
    )
    generate(run, "--prompt", "x", "--stop", r"\n\n", "--stop", "a,b", "--stop", r"ü\\ñ")
    assert seen["stop"] == ("\n\n", "a,b", "ü\\ñ")
    assert generate(run, "--prompt", "x", "--stop", "\\") == 2
    assert "write \\\\ for a backslash" in capsys.readouterr().err


def test_prompt_from_the_standard_input(run, capsys, monkeypatch) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    give("naïve".encode())
    assert generate(run, "--prompt", "-", "--max-new-tokens", 5, "--echo") == 0
    shown = capsys.readouterr().out
    generate(run, "--prompt", "naïve", "--max-new-tokens", 5, "--echo")
    assert capsys.readouterr().out == shown
    give(b"\xff\xfe")
    assert generate(run, "--prompt", "-") == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--top-k", "0"), "top_k 0"),
        (("--prompt", "x", "--top-p", "1.5"), "top_p 1.5"),
        (("--prompt", "x", "--max-new-tokens", "-3"), "max_new_tokens is -3"),
        (("--prompt", "x", "--stop", ""), "stop text is empty"),
        (("--prompt", "x", "--threads", "0"), "threads is 0"),
    ],
)
def test_wrong_options(run, capsys, words, match) -> None:
    assert generate(run, *words) == 2
    shown = capsys.readouterr()
    assert match in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_folders_that_are_no_run(run, tmp_path, capsys) -> None:
    def error(folder: Path) -> str:
        assert generate(folder, "--prompt", "x") == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        return shown

    assert "is no folder" in error(tmp_path / "nothing")
    assert "holds no model" in error(tmp_path)
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "is damaged" in error(run)
    (run / "model.safetensors").unlink()
    assert "is damaged" in error(run)
    (run / "model.safetensors").write_bytes(weights)
    (run / "tokenizer.json").write_text("{")
    assert "tokenizer" in error(run)
    (run / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in error(run)
    described = (run / "config.json").read_text()
    (run / "config.json").write_text(described[:30])
    assert "is damaged" in error(run)
    changed = json.loads(described)
    changed["config"]["embed_dim"] = 24
    (run / "config.json").write_text(json.dumps(changed))
    assert "is damaged" in error(run)
    write_model(MixerEncoder(MixerEncoderConfig(num_classes=2, vocab_size=3, embed_dim=20)), run)
    assert "holds a MixerEncoder" in error(run)
    (run / "config.json").unlink()
    (run / "options.json").write_text("{}")
    assert "has saved no model yet" in error(run)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
def test_a_reader_that_stops_and_a_user_that_stops(run) -> None:
    command = [sys.executable, "-m", "manyheads.cli", "generate", str(run)]
    command += ["--prompt", "x", "--max-new-tokens", "0", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert len(process.stdout.read(100)) == 100
    process.send_signal(signal.SIGINT)
    rest, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert shown == b""
    process = subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert len(process.stdout.read(100)) == 100
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
