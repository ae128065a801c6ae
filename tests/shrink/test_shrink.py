"""`manyheads shrink` as a person uses it: folders in, a folder and a report out, or a clear no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.families import batches, build, output
from manyheads.cli import main
from manyheads.compress import Plan, load_model, open_model, save_model
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.shrink.measure import Measured, kv_bytes_per_token
from manyheads.shrink.options import ShrinkOptions, read_budget, read_steps
from manyheads.shrink.quality import Quality
from manyheads.shrink.report import Report
from manyheads.shrink.run import recommend

pytest.importorskip("transformers")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} says that {i * i} is a square number\n" for i in range(400)))
    return path


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="gla,softmax*3"))
    model.save(tmp_path / "lm")
    return tmp_path / "lm"


def bert(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, "line": 2, "says": 3, "that": 4, "is": 5, "a": 6, "square": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    model: Any = build("bert")
    model.save_pretrained(folder)
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return folder


def shrink(*words: Any) -> int:
    return main(["shrink", *map(str, words), "--repeats", "3", "--samples", "6", "--length", "48"])


def test_a_folder_becomes_a_smaller_folder(lm: Path, text: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in lm.iterdir()}
    out = tmp_path / "small"
    code = shrink(
        lm, "--method", "llm-drop", "--drop-attention", 2, "--calibrate", text, "--out", out
    )
    assert code == 0
    assert {p.name: p.read_bytes() for p in lm.iterdir()} == before
    report = json.loads((out / "report" / "report.json").read_text())
    first, second = report["rows"]
    assert second["parameters"] < first["parameters"]
    assert second["macs"] < first["macs"]
    assert second["token_ms"] > 0
    assert first["quality"]["name"] == "bits per byte"
    assert (out / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report" / "report.html").read_text()
    assert report["answer"].split(":")[0] in page
    again = load_model(out)
    assert sum(p.numel() for p in again.parameters()) == second["parameters"]
    plan = Plan.load(out / "report" / "plan-1.json")
    model = open_model(lm).model
    ids = {"tokens": torch.randint(256, (2, 20))}
    torch.testing.assert_close(output(plan.apply(model), ids), output(again, ids), rtol=0, atol=0)


def test_an_encoder_keeps_its_tokenizer(text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    import manyheads.bridges.transformers  # noqa: F401

    source, out = bert(tmp_path / "bert"), tmp_path / "out"
    assert shrink(source, "--method", "llm-drop", "--drop-mlp", 1, "--calibrate", text,
                  "--out", out) == 0  # fmt: skip
    assert str(tmp_path) not in (out / "config.json").read_text()
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModel.from_pretrained(out)
    found = model(**tokenizer("line says that", return_tensors="pt"))
    assert found.last_hidden_state.shape[-1] == 32


def llama(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "judged"),
    [
        (["--method", "llm-drop", "--drop-attention", "1"], "bits per byte"),
        (["--method", "int8"], "bits per byte"),
        (["--method", "a2sf", "--set", "budget_tokens=20"], "bits per byte with its cache"),
    ],
)
def test_a_language_model_of_transformers(
    words: list[str], judged: str, text: Path, tmp_path: Path
) -> None:
    source, out = llama(tmp_path / "llama"), tmp_path / "out"
    assert shrink(source, *words, "--calibrate", text, "--out", out) == 0
    report = json.loads((out / "report" / "report.json").read_text())
    first, second = report["rows"]
    assert first["quality"]["name"] == judged
    assert first["token_ms"] > 0 < second["token_ms"]
    assert first["quality"]["value"] != second["quality"]["value"]
    model: Any = load_model(out)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape == (
        1, 7
    )  # fmt: skip


def test_a_plan_is_written_and_applied(lm: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    common = ("--calibrate", text, "--plan", plan)
    assert shrink(lm, "--method", "llm-drop", "--drop-attention", 1, *common) == 0
    assert Plan.load(plan).method == "llm-drop"
    assert shrink(lm, *common, "--out", tmp_path / "out") == 0
    assert shrink(lm, *common, "--method", "int8") == 2
    assert shrink(lm, *common, "--budget", "bytes=0.5") == 2
    new = ("--calibrate", text, "--plan", tmp_path / "two.json")
    assert shrink(lm, "--method", "int8", "--then", "llm-drop mlp=1", *new) == 2
    assert not (tmp_path / "two.json").exists()
    other = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="softmax*4"))
    other.save(tmp_path / "other")
    assert shrink(tmp_path / "other", *common, "--out", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists()


def test_a_budget_is_searched_and_goes_on_where_it_stopped(
    lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    words = (lm, "--method", "llm-drop", "--set", "attention=0", "--calibrate", text, "--out", out)
    import manyheads.shrink.run as run

    measured, real = [], run.measure_all

    def counting(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "measure_all", counting)
    assert shrink(*words, "--budget", "parameters=0.9") == 130
    assert not out.exists()
    assert "goes on" in capsys.readouterr().err
    monkeypatch.setattr(run, "measure_all", lambda *a, **k: (measured.append(1), real(*a, **k))[1])
    assert shrink(*words, "--budget", "parameters=0.9") == 0
    assert len(measured) == 3  # attention of 1, 2 and 3 layers, once each
    report = json.loads((out / "report" / "report.json").read_text())
    assert len(report["rows"]) == 4
    chosen = next(r for r in report["rows"] if r["name"] == report["chosen"])
    assert chosen["parameters"] <= 0.9 * report["rows"][0]["parameters"]


def test_a_budget_that_nothing_meets_shows_the_nearest(
    lm: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    code = shrink(lm, "--method", "llm-drop", "--set", "attention=0", "--calibrate", text,
                  "--out", out, "--budget", "bytes=0.01")  # fmt: skip
    assert code == 1
    assert "No setting meets bytes=0.01. The nearest is 'llm-drop attention=3'" in (
        capsys.readouterr().out
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "llm-dorp"], "did you mean 'llm-drop'"),
        (["--method", "llm-drop"], "a count above 0"),
        (["--method", "llm-drop", "--set", "attentoin=2"], "did you mean 'attention'"),
        (["--method", "llm-drop", "--set", "attention"], "is not NAME=VALUE"),
        (["--method", "masa", "--drop-attention", "2"], "--drop-attention is of llm-drop"),
        (["--method", "llm-drop", "--budget", "weight=0.5"], "a name of parameters, bytes"),
        (["--method", "llm-drop", "--budget", "bytes=half"], "'half' is no number"),
        (["--method", "llm-drop", "--drop-attention", "1"], "give --calibrate"),
        (
            ["--method", "llm-drop", "--drop-attention", "1", "--calibrate", "SHORT"],
            "fewer than one piece of 48",
        ),
    ],
)
def test_wrong_words(words: list[str], message: str, lm: Path, tmp_path: Path, capsys: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    words = [str(short) if w == "SHORT" else w for w in words]
    assert shrink(lm, *words, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        open_model("some/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no architecture"):
        open_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["os"]}'
    )
    with pytest.raises(ValueError, match="no model class 'os'"):
        open_model(tmp_path / "empty")
    with pytest.raises(ValueError, match="no model of timm"):
        open_model("no_such_model")


def test_a_full_disk_leaves_nothing(lm: Path, tmp_path: Path) -> None:
    model = open_model(lm).model

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path / "out", write_more=full)
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]
    save_model(model, tmp_path / "beside")
    (tmp_path / "beside" / "mine.txt").write_text("mine")
    save_model(model, tmp_path / "beside", overwrite=True)
    assert (tmp_path / "beside" / "mine.txt").read_text() == "mine"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_model(model, tmp_path / "taken")


def test_a_setting_that_the_model_does_not_bear_is_left_out(
    text: Path, tmp_path: Path, capsys: Any
) -> None:
    from manyheads.compress.llm_drop import LLMDrop

    source, out = llama(tmp_path / "llama"), tmp_path / "out"
    real = LLMDrop.candidates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LLMDrop, "candidates", lambda model, given: [*real(model, given), {"attention": 3}]
        )
        code = shrink(source, "--method", "llm-drop", "--set", "attention=0", "--calibrate", text,
                      "--out", out, "--budget", "bytes=0.99")  # fmt: skip
    assert code == 0
    assert "llm-drop attention=3 was left out: no attention" in capsys.readouterr().out


def test_a_shrunken_model_says_what_it_is_not_saved_with(tmp_path: Path) -> None:
    from manyheads.compress.llm_drop import LLMDrop

    model = build("llama")
    smaller: Any = LLMDrop(attention=1).plan(model, batches("llama")).apply(model)
    with pytest.raises(ValueError, match="without push_to_hub"):
        smaller.save_pretrained(tmp_path / "out", push_to_hub=True)
    smaller.save_pretrained(tmp_path / "out", state_dict=None, is_main_process=False)
    assert not (tmp_path / "out").exists()
    smaller.save_pretrained(tmp_path / "out", safe_serialization=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_cache_bytes_are_of_kept_attentions() -> None:
    from manyheads.compress.llm_drop import LLMDrop

    model = build("llama")
    assert kv_bytes_per_token(model) == 4 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, bytes
    smaller = LLMDrop(attention=1).plan(model, batches("llama")).apply(model)
    assert kv_bytes_per_token(smaller) == 3 * 2 * 2 * 8 * 4
    assert kv_bytes_per_token(build("ours")) == 2 * 2 * 32 * 4  # of four layers two are softmax


def row(name: str, size: float, time: float, quality: float) -> Measured:
    return Measured(
        name=name, parameters=int(size), weight_bytes=int(4 * size), kv_bytes=0, macs=None,
        forward_ms=time, forward_spread=0, token_ms=None,
        quality=Quality("spearman", quality, True),
    )  # fmt: skip


def test_what_is_recommended() -> None:
    rows = [row("original", 100, 10, 0.8), row("a", 90, 9, 0.79), row("b", 60, 7, 0.78),
            row("c", 50, 8, 0.4)]  # fmt: skip
    report = Report(model="m", rows=rows, data={}, machine={})
    assert recommend(report, "parameters", 0.7) == "b"
    assert recommend(report, "latency", 0.85) == "b"
    assert recommend(report, "quality", 0.03) == "b"
    assert recommend(report, "quality", 0.015) == "a"
    assert recommend(report, "bytes", 0.3) is None


def test_steps_are_read() -> None:
    options = ShrinkOptions(
        model="m", method="llm-drop", drop_attention=2, then=("llm-drop mlp=1 iterative=true",)
    )
    first, second = read_steps(options)
    assert (first.method, first.settings) == ("llm-drop", {"attention": 2})
    assert second.settings == {"mlp": 1, "iterative": True}
    assert second.text == "llm-drop mlp=1 iterative=True"
    assert read_budget("quality=0.02") == ("quality", 0.02)
    with pytest.raises(ValueError, match="between 0 and 1"):
        read_budget("latency=2")


def test_two_methods_in_a_row(lm: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shrink(lm, "--method", "llm-drop", "--drop-attention", 1, "--then", "llm-drop mlp=1",
                  "--calibrate", text, "--out", out) == 0  # fmt: skip
    kept = json.loads((out / "config.json").read_text())["manyheads_shrunk"]["steps"]
    assert [s["structure"]["drop"].keys() for s in kept] == [{"attention"}, {"mlp"}]
    assert load_model(out) is not None
