"""The language model recipe: it learns, measures rightly, repeats itself, and refuses early."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from compare import relative_error
from manyheads.cli import main
from manyheads.data import load_text, load_tokenizer, split_text
from manyheads.models import load_model
from manyheads.train import lm
from train.compare_runs import assert_equal_to_the_bit, figures, metrics


def test_a_run_leaves_all_that_is_needed(train_lm, tmp_path, capsys) -> None:
    assert train_lm("--out", "run", "--tokenizer", "byte") == 0
    shown = capsys.readouterr()
    assert "bits per byte" in shown.out
    assert "manyheads generate run" in shown.out
    assert "step      3  bits per byte" in shown.err
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [
        ".lock", "checkpoint.safetensors", "config.json", "metrics.csv", "model.safetensors",
        "options.json", "results.json", "tokenizer.json",
    ]  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == ["2", "3", "4", "6", "6"]
    assert [bool(r["loss"]) for r in rows] == [True, False, True, True, False]
    read = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"cpu", "threads", "torch", "lightning_fabric", "manyheads"} <= read["machine"].keys()
    assert read["command"].startswith("manyheads train lm --")
    assert read["figures"]["tokens_read"] == 6 * 3 * 31
    assert read["figures"]["seconds"] > 0
    assert load_model(tmp_path / "run").num_parameters() == read["parameters"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_bits_per_byte_are_those_of_the_model_that_was_kept(
    train_lm, text, tmp_path, tokenizer
) -> None:
    train_lm("--out", "run", "--tokenizer", tokenizer, "--vocab-size", 300, "--length", 32)
    run = tmp_path / "run"
    model, vocabulary = load_model(run).eval(), load_tokenizer(run / "tokenizer.json")
    held_out = split_text(load_text(text), valid_fraction=0.05).valid
    ids = vocabulary.encode(held_out).long()
    # By hand: windows of 32 that begin every 16 tokens, of which the last 16 count.
    nats, scored = 0.0, []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 33]
            logits = model(window[None, :-1])[0]
            first = 16 if start else 0
            if len(window) - 1 > first:
                nats += F.cross_entropy(logits[first:], window[first + 1 :], reduction="sum").item()
                scored.append(window[first + 1 :])
    assert torch.equal(torch.cat(scored), ids[1:])
    count = len(held_out) - int(vocabulary.token_bytes[ids[0]])
    found = figures(run)
    assert found["held_out_bytes"] == count
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-6)


def test_the_loss_falls_on_real_text(train_lm, tmp_path) -> None:
    train_lm("--out", "run", "--steps", 60, "--eval-every", 20, "--batch-size", 8)
    curve = [float(r["bits_per_byte"]) for r in metrics(tmp_path / "run") if r["bits_per_byte"]]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 4.5 < 6 < math.log2(256)
    assert figures(tmp_path / "run")["best_step"] == 60


def test_one_seed_one_run(train_lm, tmp_path) -> None:
    for out in ("a", "b"):
        train_lm("--out", out, "--dropout", 0.2)
    assert_equal_to_the_bit(tmp_path / "a", tmp_path / "b")
    train_lm("--out", "c", "--dropout", 0.2, "--seed", 1)
    assert figures(tmp_path / "a") != figures(tmp_path / "c")


def test_the_best_weights_are_kept_not_the_last(train_lm, tmp_path, monkeypatch) -> None:
    # The figures on the way are made up, best at step 10; the last is of the weights kept.
    real, given, weights = lm.bits_per_byte, iter([4.0, 3.0, 5.0, 3.5]), []

    def scripted(fabric, model, *rest) -> tuple[float, int]:
        weights.append(model.embed.weight.detach().clone())
        value = next(given, None)
        return real(fabric, model, *rest) if value is None else (value, 1)

    monkeypatch.setattr(lm, "bits_per_byte", scripted)
    train_lm("--out", "run", "--steps", 20, "--eval-every", 5)
    assert figures(tmp_path / "run")["best_step"] == 10
    assert len(weights) == 5
    assert torch.equal(weights[4], weights[1])
    assert not torch.equal(weights[3], weights[1])


def test_accumulation_changes_nothing_but_rounding(train_lm, tmp_path) -> None:
    train_lm("--out", "whole", "--batch-size", 6)
    train_lm("--out", "parts", "--batch-size", 6, "--accumulate", 3)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        for name in a:
            assert (a[name] == b[name] == "") or float(a[name]) == pytest.approx(
                float(b[name]), rel=1e-4
            ), name
    weights = [load_model(tmp_path / run).embed.weight for run in ("whole", "parts")]
    assert relative_error(weights[0], weights[1]) < 1e-4


def test_bfloat16_stays_near_float32(train_lm, tmp_path) -> None:
    train_lm("--out", "single")
    train_lm("--out", "half", "--precision", "bf16-mixed")
    single, half = (figures(tmp_path / run)["bits_per_byte"] for run in ("single", "half"))
    assert single != half
    assert half == pytest.approx(single, rel=0.02)
    assert load_model(tmp_path / "half").embed.weight.dtype == torch.float32


def test_the_gradient_is_clipped(train_lm, tmp_path) -> None:
    train_lm("--out", "free", "--clip", 0, "--steps", 2)
    train_lm("--out", "tight", "--clip", 1e-9, "--steps", 2, "--weight-decay", 0)
    norms = [float(metrics(tmp_path / run)[0]["gradient_norm"]) for run in ("free", "tight")]
    assert norms[0] > 0.1
    torch.manual_seed(0)
    # Adam divides by the norm, so its eps of 1e-8 is what keeps such a gradient small.
    moved = [load_model(tmp_path / run).norm.weight.sub(1).abs().max() for run in ("free", "tight")]
    assert moved[1] < 0.2 * moved[0]


def test_tensorboard_has_the_same_figures(train_lm, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_lm("--out", "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    rows = metrics(tmp_path / "run")
    for name in ("loss", "bits_per_byte"):
        drawn = [(e.step, e.value) for e in events.Scalars(name)]
        written = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        assert drawn == [(s, pytest.approx(v)) for s, v in written]


def test_a_finished_run_is_shown_again_and_can_be_restarted(train_lm, tmp_path, capsys) -> None:
    train_lm("--out", "run")
    before = (tmp_path / "run" / "results.json").read_bytes()
    capsys.readouterr()
    assert train_lm("--out", "run") == 0
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train_lm("--out", "run", "--restart", "--steps", 4) == 0
    assert figures(tmp_path / "run")["tokens_read"] == 4 * 3 * 31
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_quiet(train_lm, capsys) -> None:
    train_lm("--out", "run", "--no-progress")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--mixers", "gla,softmacks"), "softmax"),
        (("--mixers", "gla**2"), "layer pattern"),
        (("--mixers", "flow", "--embed-dim", "21"), "21"),
        (("--mixer-options", '{"gla": {"conv": 3}}'), "conv_size"),
        (("--embed-dim", "21"), "21"),
        (("--data", "nowhere.txt"), "does not exist"),
        (("--data", "empty.txt"), "empty"),
        (("--data", "binary.bin"), "binary"),
        (("--data", "builtin:pyhton"), "builtin:python"),
        (("--length", "30000"), "too few"),
        (("--batch-size", "4", "--accumulate", "3"), "batch_size 4 is not a multiple of 3"),
        (("--devices", "2"), "batch_size 3 is not a multiple of 2"),
        (("--steps", "0"), "steps is 0"),
        (("--tokenizer", "bpe", "--vocab-size", "100"), "100"),
        (("--accelerator", "cuda"), "accelerator 'cuda' is not there"),
        (("--out", "text.txt"), "is a file"),
        (("--out", "text.txt/run"), "is a file"),
        (("--out", "others"), "other files and no run"),
    ],
)
def test_errors_come_before_any_work(train_lm, tmp_path, capsys, words, match) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(b"a\0b" * 100)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "mine.txt").touch()
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    before = sorted(tmp_path.rglob("*"))
    out = () if "--out" in words else ("--out", "run")
    assert train_lm(*words, *out) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_in_the_folder(train_lm, tmp_path, capsys) -> None:
    train_lm("--out", "run")
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert train_lm("--out", "run", "--seed", 3) == 2
    error = capsys.readouterr().err
    assert "holds another run (seed 0 is now 3)" in error
    assert "--restart" in error
    assert main(["train", "recall", "--out", "run"]) == 2
    assert "holds a run of 'train lm', not of 'train recall'" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_loss_that_is_no_number(train_lm, tmp_path, capsys) -> None:
    assert train_lm("--out", "run", "--learning-rate", 1e20, "--steps", 50) == 2
    error = capsys.readouterr().err
    assert "lower the learning_rate" in error
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_missing_extra_is_named(train_lm, monkeypatch, capsys) -> None:
    from manyheads import errors
    from manyheads.train import launch

    def missing(module: str, extra: str, purpose: str) -> None:
        raise errors.MissingExtraError(
            f"{purpose} needs {module}: pip install 'manyheads[{extra}]'"
        )

    monkeypatch.setattr(launch, "require_extra", missing)
    assert train_lm("--out", "run") == 2
    assert "manyheads[train]" in capsys.readouterr().err


def test_layers_that_share_their_attention(train_lm, tmp_path) -> None:
    assert train_lm("--out", "run", "--share-attention", 1, "--mixers", "softmax*3") == 0
    model = load_model(tmp_path / "run")
    assert set(model.shared_atoms) == {"query", "key", "value", "output"}
    assert model.config.sharing == {"atoms": 1}
    options = ("--sharing", '{"kind": "repeat", "projections": ["query"]}')
    run = ("--out", "other", "--share-attention", 1, "--mixers", "softmax*3")
    assert train_lm(*run, *options) == 0
    assert set(load_model(tmp_path / "other").shared_atoms) == {"query"}


def test_three_layers_for_each_shared_matrix() -> None:
    options = lm.LMOptions(share_attention=4).resolved()
    assert options.mixers == "softmax*12"
    assert "--share-attention 4" in options.command()
    assert lm.LMOptions.of_preset("smoke", share_attention=2).resolved().mixers == "softmax*6"
    assert lm.LMOptions(share_attention=4, mixers="gla*8").resolved().mixers == "gla*8"
    assert lm.LMOptions().resolved().mixers == "gla*3,softmax"
    with pytest.raises(ValueError, match="needs share_attention"):
        lm.LMOptions(sharing='{"kind": "repeat"}')
    with pytest.raises(ValueError, match="share_attention is 0"):
        lm.LMOptions(share_attention=0)
