"""Recall and URPE's tasks: they learn, measure on what they never saw, and report honestly."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.cli import main
from manyheads.data import get_task
from manyheads.data.synthetic import PositionConfig, RecallConfig
from manyheads.models import load_model
from manyheads.train.recall import decoding_state_bytes
from train.compare_runs import figures, metrics


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


RECALL = (
    "--mixers", "gla,softmax", "--embed-dim", "20", "--num-heads", "2", "--vocab-size", "21",
    "--length", "17", "--pairs", "3", "--batch-size", "9", "--steps", "6", "--eval-every", "3",
    "--eval-samples", "31",
)  # fmt: skip
POSITIONS = (
    "--words", "40", "--length", "9", "--num-layers", "1", "--embed-dim", "20", "--num-heads", "2",
    "--mlp-dim", "36", "--batch-size", "16", "--eval-samples", "31",
)  # fmt: skip


def test_recall_counts_queries_it_never_saw(tmp_path) -> None:
    assert main(["train", "recall", *RECALL, "--out", "run"]) == 0
    found = figures(tmp_path / "run")
    assert found["queries"] == 31 * 3
    assert found["chance"] == pytest.approx(1 / 11)
    config = RecallConfig(vocab_size=21, length=17, pairs=3)
    # The second 31 of the held-out fold: the first were used to keep the best weights.
    batch = get_task("recall").batch(config, seed=0, indices=range(31, 62), fold="held_out")
    model = load_model(tmp_path / "run").eval()
    with torch.no_grad():
        right = (model(batch.inputs).argmax(-1) == batch.targets).sum().item()
    assert found["accuracy"] == right / 93


def test_state_bytes_are_those_of_decoding(tmp_path) -> None:
    main(["train", "recall", *RECALL, "--out", "run", "--mixers", "gla*2"])
    model = load_model(tmp_path / "run")
    # Two layers of two heads of 5 keys and 10 values, in float32.
    assert figures(tmp_path / "run")["state_bytes"] == 2 * 2 * 5 * 10 * 4
    assert decoding_state_bytes(model, 3) == decoding_state_bytes(model, 300)


def test_recall_errors(capsys) -> None:
    assert main(["train", "recall", *RECALL, "--pairs", "9", "--out", "run"]) == 2
    assert "9 pairs need 4 places each" in capsys.readouterr().err
    assert main(["train", "recall", *RECALL, "--vocab-size", "4", "--out", "run"]) == 2
    assert "vocab_size 4" in capsys.readouterr().err
    assert main(["train", "recall", *RECALL, "--mixers", "flow,nrom", "--out", "run"]) == 2
    assert "'norm'" in capsys.readouterr().err


def train(*words: str) -> int:
    return main(["train", "urpe-tasks", *POSITIONS, *words])


def test_urpe_finds_places_and_a_bias_alone_cannot(tmp_path) -> None:
    words = ("--steps", "250", "--learning-rate", "1e-2", "--eval-every", "50")
    assert train(*words, "--out", "urpe") == 0
    assert train(*words, "--out", "bias", "--no-multiplier") == 0
    urpe, bias = (figures(tmp_path / name) for name in ("urpe", "bias"))
    assert urpe["places"] == bias["places"] == 31 * 8
    assert urpe["accuracy"] > 0.9
    assert bias["accuracy"] < 0.4
    parameters = [
        json.loads((tmp_path / name / "results.json").read_text())["parameters"]
        for name in ("urpe", "bias")
    ]
    # The table of multipliers: 2 N - 1 distances, two heads.
    assert parameters[0] - parameters[1] == 17 * 2


def test_even_tokens_and_their_head(tmp_path) -> None:
    assert train("--task", "etp", "--steps", "4", "--eval-every", "2", "--out", "run") == 0
    model = load_model(tmp_path / "run")
    assert model.config.tie_embeddings
    config = PositionConfig(words=40, length=9)
    batch = get_task("etp").batch(config, seed=0, indices=range(31, 62), fold="held_out")
    with torch.no_grad():
        right = (model.eval()(batch.inputs).argmax(-1) == batch.targets).sum().item()
    found = figures(tmp_path / "run")
    assert found["places"] == 31 * 9
    assert found["accuracy"] == right / found["places"]
    assert [r["step"] for r in metrics(tmp_path / "run") if r["accuracy"]] == ["2", "4"]


def test_urpe_errors(capsys) -> None:
    for words, match in (
        (("--length", "90"), "length 90"),
        (("--words", "10"), "words 10"),
        (("--num-heads", "3"), "3"),
    ):
        assert train(*words, "--out", "run") == 2
        shown = capsys.readouterr().err
        assert match in shown
        assert shown.count("\n") == 1
