"""Cache policies as a person uses them: on runs of ours, judged token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.cli import main
from manyheads.compress import load_model
from manyheads.compress.a2sf import A2SF, H2O, continuation_loss
from manyheads.compress.a2sf.quality import cache_bytes
from manyheads.data import get_task
from manyheads.data.tokenizers import load_tokenizer
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.shrink.data import Feed, _sentences
from manyheads.shrink.options import ShrinkOptions, read_steps
from manyheads.shrink.recall import answered, recall_run

for needed in ("rich", "matplotlib", "lightning_fabric", "transformers"):
    pytest.importorskip(needed)


def shrink(*words: Any) -> int:
    return main(["shrink", *map(str, words), "--repeats", "3", "--length", "48"])


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "report" / "report.json").read_text())["rows"]
    return rows


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says that {i * i} is a square number\n" for i in range(99)))
    return path


@pytest.mark.parametrize("method", ["a2sf", "h2o", "snapkv", "sink-recent", "streaming"])
def test_a_run_of_a_language_model(method: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="gla,softmax*2"))
    model.save(tmp_path / "lm")
    out = tmp_path / "out"
    assert shrink(tmp_path / "lm", "--method", method, "--set", "budget_tokens=20",
                  "--calibrate", text, "--samples", 6, "--out", out) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "bits per byte with its cache" in printed
    assert "% of the cache" in printed
    first, second = (row["quality"] for row in rows_of(out))
    assert first["value"] != second["value"]
    state = 2 * 8 * 16 * 4  # of the recurrent layer, whose keys have half the width
    key = 2 * 32 * 4  # a key and a value of all heads
    assert first["cache_bytes"] == state + 2 * 47 * key
    scores = 0 if method in ("sink-recent", "streaming") else 4
    assert second["cache_bytes"] == state + 2 * 20 * (key + 2 * (4 + 1 + scores))
    small: Any = load_model(out)
    assert len(list(small.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4))) == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall") / "run"
    words = "train recall --preset smoke --mixers softmax*2 --steps 60 --eval-every 30"
    assert main([*words.split(), "--vocab-size", "36", "--out", str(folder)]) == 0
    return folder


def test_recall_is_the_share_of_queries_answered(run: Path, tmp_path: Path) -> None:
    common = (run, "--evaluate", "builtin:recall", "--samples", 50, "--batch", 20)
    values = {}
    for budget in (4, 24):
        out = tmp_path / f"out-{budget}"
        assert shrink(*common, "--method", "a2sf", "--set", f"budget_tokens={budget}",
                      "--out", out) == 0  # fmt: skip
        values[budget] = [row["quality"]["value"] for row in rows_of(out)]
        assert rows_of(out)[1]["quality"]["name"] == "queries answered with its cache"
    assert values[24][0] == values[24][1] == values[4][0] > values[4][1]
    # By hand: sequences that neither training nor the choice of weights has seen.
    found = recall_run(run)
    assert found is not None
    assert (found.task.vocab_size, found.task.pairs, found.judged) == (36, 2, 200)
    task = get_task("recall")
    batch = task.batch(found.task, seed=found.seed, indices=range(200, 250), fold="held_out")
    scored = batch.targets >= 0
    model: Any = load_model(run)
    with torch.no_grad(), A2SF(budget=4).attach(model):
        whole = model(batch.inputs).argmax(-1)
        evicted = answered(model, batch.inputs, prompt=4)[0]
    for answers, value in ((whole, values[4][0]), (evicted, values[4][1])):
        assert float((answers == batch.targets)[scored].double().mean()) == pytest.approx(value)


def test_recall_judges_other_methods_too(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shrink(run, "--evaluate", "builtin:recall", "--samples", 20, "--method", "llm-drop",
                  "--drop-mlp", 1, "--out", out) == 0  # fmt: skip
    first = rows_of(out)[0]["quality"]
    assert first["name"] == "queries answered"
    assert first["cache_bytes"] is None


def test_recall_and_text_are_not_mixed(run: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--method", "a2sf", "--set", "budget_tokens=9")
    for data in (("--evaluate", text), ("--calibrate", "builtin:recall", "--evaluate", text)):
        assert shrink(run, *words, *data) == 2
        assert "give builtin:recall" in capsys.readouterr().err
    model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="softmax"))
    model.save(tmp_path / "lm")
    assert shrink(tmp_path / "lm", *words, "--evaluate", "builtin:recall") == 2
    assert "train recall" in capsys.readouterr().err
    for damaged in ('{"recipe": "recall"}', '{"recipe": "recall", "options": {"vocab_size": 3}}'):
        (tmp_path / "lm" / "options.json").write_text(damaged)
        assert shrink(tmp_path / "lm", *words, "--evaluate", "builtin:recall") == 2
        assert "does not say what" in capsys.readouterr().err


def test_a_run_with_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text, run, out = tmp_path / "text.txt", tmp_path / "run", tmp_path / "out"
    text.write_text("".join(f"line {i} says that {i * i} is a square\n" for i in range(3000)))
    words = "train lm --preset smoke --mixers softmax*2 --tokenizer bpe --steps 2 --eval-every 2"
    assert main([*words.split(), "--data", str(text), "--out", str(run)]) == 0
    assert shrink(run, "--method", "h2o", "--set", "budget_tokens=9", "--calibrate", text,
                  "--samples", 4, "--out", out) == 0  # fmt: skip
    first, second = (row["quality"]["value"] for row in rows_of(out))
    # By hand: 24 tokens after 24 of each of four pieces, and the bytes that they stand for.
    tokenizer, model = load_tokenizer(run / "tokenizer.json"), load_model(run)
    ids = tokenizer.encode(text.read_text()[:9999])[: 4 * 48].view(4, 48)
    for policy, value in ((None, first), (H2O(budget=9), second)):
        losses, _ = continuation_loss(model, ids, prompt=24, policy=policy)
        assert tokenizer.bits_per_byte(float(losses.sum()), ids[:, 24:]) == pytest.approx(value)
    assert first != second
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").unlink()
    assert shrink(run, "--method", "h2o", "--set", "budget_tokens=9", "--calibrate", text) == 2


def test_the_cache_of_a_transcript_is_counted() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    said, heard = DynamicCache(), DynamicCache()
    said.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), 0)
    heard.update(torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 4), 0)
    assert cache_bytes(EncoderDecoderCache(said, heard)) == 2 * 4 * 2 * 3 * 4 * (5 + 7)


def test_a_setting_of_a_wrong_type_is_named() -> None:
    options = ShrinkOptions(model="m", method="quamba", set=("percentile=none",))
    with pytest.raises(ValueError, match='percentile="none"; values are JSON'):
        read_steps(options)


def test_what_judges_is_not_what_calibrates(tmp_path) -> None:
    text = "".join(f"line {i:04d} of a text with words\n" for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    source = str(tmp_path / "text.txt")
    feed = Feed(kind="causal", vocab=256, length=31, batch=3)
    first, last = (
        torch.cat([b["tokens"] for b in feed.batches(source, samples=5, to_judge=judge)])
        for judge in (False, True)
    )
    assert bytes(first.flatten().tolist()).decode() == text[: 5 * 31]
    assert bytes(last.flatten().tolist()).decode() == text[-5 * 31 :]
    lines = text.splitlines()
    apart = [set(_sentences(text, 7, between=judge)) for judge in (False, True)]
    assert len(apart[0]) == len(apart[1]) == 7
    assert apart[0] | apart[1] <= set(lines)
    assert not apart[0] & apart[1]
