"""``train distil`` on a tiny teacher in a folder: learns, goes on to the same bits, refuses."""

from __future__ import annotations

import json
import random

import pytest
import torch

from manyheads.cli import main
from manyheads.compress.minilm import load_bert, save_bert
from manyheads.models.language.bert import BertConfig, BertEncoder
from manyheads.train import distil_data
from manyheads.train.distil import load_run
from manyheads.train.distil_data import SentenceBatches, encode, pad, read_tokenizer
from train.compare_runs import assert_equal_to_rounding, assert_equal_to_the_bit, figures

WORDS = [a + b for a in ("ba", "de", "ki", "lo", "mu", "na") for b in ("ra", "se", "ti", "vo")]
FLAGS = (
    "--steps", "9", "--batch-size", "8", "--eval-every", "3", "--log-every", "2", "--length", "9",
    "--num-layers", "2", "--hidden-size", "18", "--no-lee", "--valid-fraction", "0.1",
)  # fmt: skip


@pytest.fixture
def teacher(tmp_path):
    """A random BERT of 24 words, with its tokenizer, as transformers writes folders."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("lightning_fabric")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path / "teacher"
    sizes = {"vocab_size": len(names), "hidden_size": 36, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 52, "max_position_embeddings": 24}
    save_bert(BertEncoder(BertConfig(**sizes, initializer_range=0.15)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randrange(2, 12))) + "." for _ in range(90)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def distil(teacher, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def train(*words: object) -> int:
        common = ["train", "distil", "--teacher", str(teacher), "--data", str(text), *FLAGS]
        return main([*common, *map(str, words)])

    return train


def test_it_learns_and_writes_a_folder_for_others(distil, teacher, tmp_path) -> None:
    words = ("--steps", "120", "--eval-every", "20", "--learning-rate", "5e-3", "--start", "random")
    assert distil("--out", "short", "--steps", "1", "--start", "random") == 0
    assert distil("--out", "long", *words) == 0
    before, after = (figures(tmp_path / n)["valid_cosine"] for n in ("short", "long"))
    assert after > before + 0.2
    student = load_run(tmp_path / "long")
    stock = load_bert(tmp_path / "long" / "student")
    for name, tensor in student.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    assert (tmp_path / "long" / "student" / "tokenizer.json").read_bytes() == (
        teacher / "tokenizer.json"
    ).read_bytes()
    found = json.loads((tmp_path / "long" / "results.json").read_text())["figures"]
    assert found["parameters"] == student.num_parameters() < found["teacher_parameters"]


def test_minilm_alone_as_in_the_paper(distil, tmp_path) -> None:
    words = ("--embedding-weight", 0, "--relation-share", 1, "--start", "random", "--dropout", 0.1)
    assert distil("--out", "a", *words, "--steps", 1, "--eval-every", 1) == 0
    assert distil("--out", "b", *words, "--steps", 90, "--learning-rate", "5e-3") == 0
    before, after = (figures(tmp_path / n)["valid_relation_loss"] for n in ("a", "b"))
    assert after < 0.7 * before


def test_a_run_is_a_teacher_and_so_an_assistant(distil, teacher, text, tmp_path) -> None:
    assert distil("--out", "assistant", "--num-layers", 3) == 0
    assert main(
        ["train", "distil", "--teacher", "assistant", "--data", str(text), *FLAGS, "--out", "small"]
    ) == 0  # fmt: skip
    assert load_run(tmp_path / "small").config.num_hidden_layers == 2


@pytest.mark.parametrize("words", [(), ("--embedding-weight", 0, "--relation-share", 1)])
def test_stopped_and_gone_on(distil, tmp_path, monkeypatch, words) -> None:
    words = (*words, "--dropout", 0.1, "--accumulate", 2, "--save-every", 2)
    assert distil("--out", "whole", *words) == 0
    usual = SentenceBatches.batch

    def batch(self, step):
        if step == 10:
            raise ValueError("a power cut")
        return usual(self, step)

    monkeypatch.setattr(SentenceBatches, "batch", batch)
    assert distil("--out", "cut", *words) == 2
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.setattr(SentenceBatches, "batch", usual)
    assert distil("--out", "cut", *words) == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_train_as_one(distil, tmp_path) -> None:
    # A part of a batch is sentences of like lengths, so as many parts are compared.
    assert distil("--out", "one", "--accumulate", 2, "--threads", 1) == 0
    assert distil("--out", "two", "--devices", 2, "--threads", 1) == 0
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")


def test_the_teacher_is_asked_once(distil, tmp_path, monkeypatch) -> None:
    calls = []
    usual = distil_data.embed
    from manyheads.train import distil_losses

    monkeypatch.setattr(distil_losses, "embed", lambda *a: calls.append(1) or usual(*a))
    assert distil("--out", "run") == 0
    assert len(calls) == 2  # training and held-out sentences
    assert distil("--out", "run") == 0
    assert len(calls) == 2


def test_batches_hold_every_sentence_once_an_epoch() -> None:
    rows = [torch.arange(n).numpy() for n in torch.randint(3, 30, (50,)).tolist()]
    targets = torch.arange(50.0)[:, None]
    ours = [SentenceBatches(rows, targets, batch_size=5, seed=1).batch(k) for k in range(20)]
    for epoch in (ours[:10], ours[10:]):
        assert sorted(torch.cat([b.target for b in epoch]).flatten().tolist()) == list(range(50))
    assert not torch.equal(ours[0].target, ours[10].target)
    spread = [int(b.mask.sum(1).max() - b.mask.sum(1).min()) for b in ours[:10]]
    assert sum(spread) < 40
    two = [SentenceBatches(rows, targets, batch_size=5, seed=1, rank=r, world_size=2).batch(3)
           for r in (0, 1)]  # fmt: skip
    assert torch.equal(two[0].target, ours[6].target)
    assert torch.equal(two[1].target, ours[7].target)


def test_long_sentences_keep_their_last_token(teacher) -> None:
    (row,) = encode(read_tokenizer(teacher), (" ".join(WORDS),), 7)
    assert len(row) == 7
    assert row[0] == 2
    assert row[-1] == 3
    tokens, mask = pad([row, row[:3]])
    assert tokens[1].tolist() == [*row[:3].tolist(), 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [7, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-heads", 2, "--start", "random"), "the teacher has 3 heads and the student 2"),
        (("--num-layers", 4), "layers must be from 1 to the teacher's 3"),
        (("--hidden-size", 39), "hidden_size 39 exceeds the teacher's 36"),
        (("--hidden-size", 20), "hidden_size 20 is not a multiple"),
        (("--embedding-weight", 0), "leaves steps without a loss"),
        (("--teacher-layer", 3), "layer 3 is outside the model's 3 layers"),
        (("--teacher", "nowhere"), "has no config.json"),
        (("--data", "nowhere.txt"), "does not exist"),
        (("--max-sentences", 1), "has 1 sentences"),
    ],
)
def test_errors_come_before_any_work(distil, tmp_path, capsys, words, message) -> None:
    assert distil("--out", "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
