"""Workloads: what flags and a model's config.json say, and every wrong value as one sentence."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from manyheads.choose.from_options import read_mixers, shapes_of_model, workload_from_options
from manyheads.choose.options import ChooseOptions
from manyheads.choose.workload import EXAMPLE, Workload
from manyheads.registry import get_mechanism, list_mechanisms


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "length 0 must be at least 1"),
        ({"lengths": (64, -1)}, "lengths -1 must be at least 1"),
        ({"heads": 8, "kv_heads": 3}, "does not divide heads 8: use one of 1, 2, 4, 8"),
        ({"budget": 0.0}, "budget 0 s must be above zero"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"dtype": "float33"}, "did you mean 'float32'"),
        ({"phases": ("train", "decod")}, "did you mean 'decode'"),
        ({"probes": ("recal",)}, "did you mean 'recall'"),
        ({"mixers": ("glaa",)}, "unknown mechanism 'glaa' \\(did you mean 'gla'\\?\\)"),
        ({"mixers": ("gla*0,softmax",)}, "'gla\\*0' is no part of a layer pattern"),
        ({"causal": False, "mixers": ("gla",)}, "'gla' is causal only"),
        ({"causal": False, "phases": ("decode",)}, "phase decode is causal"),
        ({"causal": False, "data": "builtin:python"}, "drop --no-causal"),
        ({"threads": 0}, "threads 0 must be at least 1"),
    ],
)
def test_wrong_values_are_named(values, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Workload(**values)
    assert "\n" not in str(caught.value)


def test_candidates_are_what_fits() -> None:
    names = [n for n in list_mechanisms() if get_mechanism(n).geometry == "sequence"]
    assert list(Workload().candidates) == [n for n in names if get_mechanism(n).causal]
    assert list(Workload(causal=False).candidates) == [
        n for n in names if get_mechanism(n).bidirectional
    ]


def test_softmax_is_always_compared_with() -> None:
    w = Workload(mixers=("gla", "gla*3,softmax"))
    assert w.candidates == ("gla", "gla*3,softmax", "softmax")
    assert w.mechanisms == ("gla", "softmax")
    assert w.hybrids == ("gla*3,softmax",)


def test_phases_follow_the_direction() -> None:
    assert Workload().does == ("train", "decode")
    assert Workload(causal=False).does == ("train",)
    assert Workload(phases=("decode", "prefill")).does == ("prefill", "decode")


@pytest.mark.parametrize("length", [1, 63, 128, 200, 4096, 100_000])
def test_the_ladder_ends_at_the_length(length) -> None:
    ladder = Workload(length=length).ladder
    assert ladder[-1] == length
    assert list(ladder) == sorted(set(ladder))
    assert all(a <= b / 2 + 1 for a, b in pairwise(ladder))


def test_long_ladders_begin_where_predictions_hold() -> None:
    """From 256 to 131,072 is too far: what is predicted there starts from 1,024."""
    assert Workload(length=131_072).ladder[0] == 1024
    assert Workload(length=8192).ladder[0] <= 256


def test_given_lengths_are_kept_and_long_ones_get_a_short_one() -> None:
    assert Workload(length=100, lengths=(30, 60)).ladder == (30, 60, 100)
    assert Workload(length=8192, lengths=(4096,)).ladder == (512, 4096, 8192)


def test_json_there_and_back() -> None:
    w = Workload(mixers=("gla*3,softmax",), lengths=(10, 20), length=20, probes=("copy",))
    assert Workload.from_json(w.to_json()) == w


def test_mixers_as_text() -> None:
    assert read_mixers(("gla,softmax",)) == ("gla", "softmax")
    assert read_mixers(("gla*3,softmax",)) == ("gla*3,softmax",)
    assert read_mixers(("gla; gla*1, softmax*1", "softmax")) == (
        "gla",
        "gla*1,softmax*1",
        "softmax",
    )
    with pytest.raises(ValueError, match="name nothing"):
        read_mixers((" ; ",))


def test_without_flags_the_example_runs() -> None:
    assert workload_from_options(ChooseOptions()) == EXAMPLE
    assert workload_from_options(ChooseOptions(budget="90s", seed=3)) == EXAMPLE.replace(
        budget=90.0, seed=3
    )
    plain = workload_from_options(ChooseOptions(length=512))
    assert plain.data is None
    assert plain.probes == ()


def test_the_longest_of_the_lengths_is_the_length() -> None:
    assert workload_from_options(ChooseOptions(lengths=(300, 100))).length == 300
    assert workload_from_options(ChooseOptions(lengths=(300, 100), length=100)).length == 100


@pytest.mark.parametrize("budget", ["0", "0s", "-5", "soon", "1.2.3"])
def test_wrong_budgets(budget) -> None:
    with pytest.raises(ValueError, match="duration"):
        workload_from_options(ChooseOptions(budget=budget))


def config_of(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 16, "max_position_embeddings": 8192,
}  # fmt: skip


def test_shapes_of_llama(tmp_path) -> None:
    assert shapes_of_model(config_of(tmp_path, **LLAMA)) == {
        "heads": 32, "kv_heads": 8, "head_dim": 64, "model_layers": 16, "length": 8192,
        "causal": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (
            {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024},
            (12, None, 64, 12, 1024, True),
        ),
        (
            {"model_type": "opt", "hidden_size": 768, "num_attention_heads": 12,
             "num_hidden_layers": 12, "max_position_embeddings": 2048},
            (12, None, 64, 12, 2048, True),
        ),
        (
            {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12,
             "num_hidden_layers": 12, "max_position_embeddings": 512},
            (12, None, 64, 12, 512, False),
        ),
        (
            {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
             "num_key_value_heads": 8, "num_hidden_layers": 28, "max_position_embeddings": 40960},
            (16, 8, 128, 28, 40960, True),
        ),
        ({"model_type": "x", "text_config": LLAMA}, (32, 8, 64, 16, 8192, True)),
    ],
)  # fmt: skip
def test_shapes_of_other_families(tmp_path, config, shapes) -> None:
    values = shapes_of_model(config_of(tmp_path, **config))
    names = ("heads", "kv_heads", "head_dim", "model_layers", "length", "causal")
    assert tuple(values.get(n) for n in names) == shapes
    Workload(**values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "no num_attention_heads or n_head"),
        ({"num_attention_heads": 4, "num_hidden_layers": 2}, "no hidden_size"),
        ({"hidden_size": 65, "num_attention_heads": 4, "num_hidden_layers": 2}, "not a multiple"),
    ],
)
def test_a_config_without_the_needed_keys(tmp_path, config, message) -> None:
    with pytest.raises(ValueError, match=message):
        shapes_of_model(config_of(tmp_path, **config))


def test_no_config_and_no_json(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        shapes_of_model(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="no JSON"):
        shapes_of_model(tmp_path)


def test_flags_go_before_the_model(tmp_path) -> None:
    folder = str(config_of(tmp_path, **LLAMA))
    w = workload_from_options(ChooseOptions(model=folder, length=100, batch=2))
    assert (w.length, w.heads, w.kv_heads, w.batch, w.model_layers) == (100, 32, 8, 2, 16)
    assert workload_from_options(ChooseOptions(model=folder, heads=4)).kv_heads is None
