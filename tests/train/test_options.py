"""Presets, what makes two commands one run, and commands that can be given again."""

from __future__ import annotations

import argparse
import shlex

import pytest

from manyheads.options import add_flags, read_flags
from manyheads.train.mixer_options import ClassifyOptions, LMOptions, RecallOptions
from manyheads.train.options import GenerateOptions, URPETaskOptions

ALL = [LMOptions, ClassifyOptions, RecallOptions, URPETaskOptions]


def read(options, text: str):
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    return read_flags(parser.parse_args(shlex.split(text)), options)


@pytest.mark.parametrize("options", ALL)
def test_presets(options) -> None:
    smoke = options.presets["smoke"]
    assert read(options, "--preset smoke") == options.of_preset("smoke")
    assert {k: getattr(options.of_preset("smoke"), k) for k in smoke} == smoke
    # A flag wins over the preset, also where it repeats the default.
    usual = options().steps
    assert read(options, f"--preset smoke --steps {usual}").steps == usual != smoke["steps"]
    assert read(options, "") == options()


@pytest.mark.parametrize("options", ALL)
def test_help_names_every_flag(options) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    for action in parser._actions:
        assert action.help, action.dest
    assert f"smoke: {options.presets['smoke']['steps']}" in parser.format_help()


@pytest.mark.parametrize(
    "text",
    [
        "--preset smoke",
        "--mixers 'gla*3,softmax' --no-tie-embeddings --dropout 0.1 --data 'my file.txt'",
        """--preset smoke --steps 1000 --mixer-options '{"gla": {"conv_size": 4}}' --tensorboard""",
        "--preset smoke --accumulate 2 --devices 2 --clip 0 --threads 1",
    ],
)
def test_the_command_gives_the_options_back(text) -> None:
    options = read(LMOptions, text).resolved()
    words = shlex.split(options.command())
    assert words[:3] == ["manyheads", "train", "lm"]
    again = read(LMOptions, shlex.join(words[3:])).resolved()
    assert again.identity() == options.identity()
    assert again.default_folder() == options.default_folder() == options.out


def test_where_and_how_do_not_make_another_run() -> None:
    usual = LMOptions().resolved()
    same = LMOptions(devices=2, accumulate=4, threads=1, save_every=7, progress=False).resolved()
    assert same.out == usual.out
    for change in ({"seed": 1}, {"steps": 999}, {"data": "x.txt"}, {"precision": "bf16-mixed"}):
        assert LMOptions(**change).resolved().out != usual.out
    assert usual.out.startswith("runs/lm-gla-3-softmax-python-")


def test_warmup_follows_from_the_steps() -> None:
    assert LMOptions(steps=400).resolved().warmup == 20
    assert LMOptions(steps=400, warmup=0).resolved().warmup == 0
    with pytest.raises(ValueError, match="warmup 5 is longer than the run of 4 steps"):
        LMOptions(steps=4, warmup=5).resolved()


@pytest.mark.parametrize(
    ("options", "values", "match"),
    [
        (LMOptions, {"steps": 0}, "steps is 0"),
        (LMOptions, {"length": 0}, "length is 0"),
        (LMOptions, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (LMOptions, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (LMOptions, {"lr_floor": 1.5}, "lr_floor is 1.5"),
        (LMOptions, {"dropout": 1.0}, "dropout is 1.0"),
        (LMOptions, {"clip": -1.0}, "clip is -1.0"),
        (LMOptions, {"mixer_options": "{"}, "is no JSON"),
        (LMOptions, {"mixer_options": "[1]"}, "must be a JSON object"),
        (LMOptions, {"mixer_options": '{"gla": 1}'}, "must map mechanisms"),
        (LMOptions, {"precision": "fp8"}, "precision 'fp8' is none of"),
        (LMOptions, {"tokenizer": "words"}, "tokenizer 'words' is none of"),
        (ClassifyOptions, {"valid_fraction": 1.0}, "valid_fraction is 1.0"),
        (RecallOptions, {"pairs": 0}, "pairs is 0"),
        (URPETaskOptions, {"task": "copy"}, "task 'copy' is none of pi, etp"),
        (GenerateOptions, {"run": "x", "prompt": "y", "max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_values_out_of_range(options, values, match) -> None:
    with pytest.raises(ValueError, match=match):
        options(**values)
