"""The image recipe: all held-out images count, averaged weights resume, wrong files are named."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyheads.cli import main
from manyheads.data.images import load_images, open_image
from manyheads.models import create_model, load_model
from manyheads.train.options import VisionOptions
from manyheads.train.vision_data import ImageBatches, transform
from train.compare_runs import (
    assert_equal_to_rounding,
    assert_equal_to_the_bit,
    figures,
    metrics,
)

SMALL = '{"depths": [1, 1, 1, 1], "embed_dims": [8, 12, 16, 20], "patch": [3, 2, 1]}'
TINY = (
    "--model-options", SMALL, "--batch-size", "8", "--steps", "12", "--eval-every", "6",
    "--image-size", "16", "--learning-rate", "3e-3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def vision(*words: object) -> int:
    return main(["train", "vision", *TINY, *map(str, words)])


def write_folder(root: Path, classes=("cat", "dog", "owl"), count: int = 10, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_digits_are_learnt_and_predicted(tmp_path, capsys) -> None:
    assert vision("--out", "run", "--steps", 250, "--batch-size", 32) == 0
    found = figures(tmp_path / "run")
    assert found["test_images"] == 359
    assert found["test_accuracy"] > 0.8
    data = load_images("builtin:digits")
    for i in range(3):
        Image.fromarray(data.test.images[i]).save(f"{i}.png")
    capsys.readouterr()
    assert main(["predict", "run", "0.png", "1.png", "2.png", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["image"] for r in rows] == ["0.png", "1.png", "2.png"]
    assert all(len(r["classes"]) == 5 for r in rows)
    assert sum(int(r["classes"][0][0]) == data.test.labels[i] for i, r in enumerate(rows)) >= 2
    assert main(["predict", "run", "0.png", "--format", "csv", "--top-k", "2"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [t["rank"] for t in table] == ["1", "2"]
    assert table[0]["class"] == rows[0]["classes"][0][0]


def test_accuracy_is_over_all_held_out_images(tmp_path) -> None:
    write_folder(Path("data"))
    assert vision("--data", "data", "--out", "run", "--test-fraction", 0.3) == 0
    found = figures(tmp_path / "run")
    assert found["test_images"] == 9
    model = load_model("run").eval()
    data = load_images("data", test_fraction=0.3)
    make = transform(VisionOptions(image_size=16), 3, training=False)
    right = 0
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        with torch.no_grad():
            right += int(model(make(open_image(image, 3))[None]).argmax() == int(label))
    assert found["right"] == right


def test_own_split_and_grey_or_transparent_images(tmp_path) -> None:
    write_folder(Path("d/train"), count=4)
    write_folder(Path("d/val"), count=2, seed=1)
    Image.new("RGBA", (9, 7), (255, 0, 0, 0)).save("d/train/cat/clear.png")
    data = load_images("d")
    assert (len(data.train), len(data.test)) == (13, 6)
    (clear,) = (p for p in data.train.images if p.name == "clear.png")
    assert np.asarray(open_image(clear, 3)).min() == 255
    write_folder(Path("d/val/fish"), classes=("x",), count=1)
    with pytest.raises(ValueError, match="fish"):
        load_images("d")


@pytest.mark.parametrize("more", [(), ("--ema", 0.9), ("--mixup", 0.4, "--augment", "rand-m5")])
def test_interrupted_and_resumed_is_equal_to_the_bit(tmp_path, monkeypatch, more) -> None:
    write_folder(Path("data"))
    assert vision("--data", "data", "--out", "whole", *more) == 0
    usual = ImageBatches.batch

    def batch(self, number: int):
        if number == 7:
            signal.raise_signal(signal.SIGINT)
        return usual(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(ImageBatches, "batch", batch)
        assert vision("--data", "data", "--out", "parts", *more) == 130
    assert vision("--data", "data", "--out", "parts", *more) == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "parts")


def test_averaged_weights_are_what_is_kept(tmp_path) -> None:
    write_folder(Path("data"))
    vision("--data", "data", "--out", "plain")
    vision("--data", "data", "--out", "mean", "--ema", 0.99)
    plain, mean = (load_model(tmp_path / n).state_dict() for n in ("plain", "mean"))
    assert any(not torch.equal(plain[k], mean[k]) for k in plain)
    losses = [[r["loss"] for r in metrics(tmp_path / n) if r["loss"]] for n in ("plain", "mean")]
    assert losses[0] == losses[1]


def test_wrong_input_is_named(tmp_path, capsys) -> None:
    write_folder(Path("data"))
    Path("data/cat/broken.png").write_bytes(b"not an image")
    assert vision("--data", "data", "--out", "run") == 2
    assert "broken.png" in capsys.readouterr().err
    assert vision("--data", "data", "--out", "run", "--bad", "skip") == 0
    assert figures(tmp_path / "run")["skipped_files"] == 1
    for words, said in (
        (("--data", "nowhere"), "is no folder"),
        (("--data", "builtin:digit"), "did you mean 'digits'"),
        (("--model", "poolformer_s13"), "did you mean"),
        (("--model", "gla_340m"), "no vision backbone"),
        (("--model-options", "{"), "is no JSON"),
        (("--mixup", 0.5, "--batch-size", 7), "odd"),
    ):
        assert vision("--out", "other", *words) == 2
        assert said in capsys.readouterr().err
        assert not Path("other").exists()
    assert main(["predict", "run", "data/cat/broken.png"]) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main(["predict", "run", "data/cat", "--bad", "skip"]) == 1
    assert "skipped" in capsys.readouterr().err
    assert main(["predict", "nowhere", "data/cat/0.png"]) == 2


def test_fine_tuning_starts_from_a_checkpoint_of_other_classes(tmp_path) -> None:
    options = {k: tuple(v) for k, v in json.loads(SMALL).items()}
    source = create_model("poolformer_s12", num_classes=1000, **options)
    torch.save({"model": source.to_official()}, "w.pth.tar")
    write_folder(Path("data"))
    assert vision("--data", "data", "--out", "run", "--weights", "w.pth.tar", "--steps", 1,
                  "--learning-rate", 1e-9, "--warmup", 0) == 0  # fmt: skip
    model = load_model("run")
    assert model.head.weight.shape == (3, 20)
    assert torch.allclose(model.stem.weight, source.stem.weight, atol=1e-6)


def test_two_processes_are_one(tmp_path) -> None:
    write_folder(Path("data"))
    # With pooling a norm's bias has no gradient but rounding, which Adam would make steps of.
    sizes = '{"depths": [1, 1], "embed_dims": [8, 16], "mlp_ratios": [2, 2], "num_heads": [2, 2],'
    sizes += ' "mixers": "attention", "norm": "channel", "layer_scale": null, "patch": [3, 2, 1]}'
    more = ("--augment", "rand-m5-mstd0.5", "--flip", "--erase", 0.3, "--drop-path", 0)
    for name, devices in (("one", 1), ("two", 2)):
        words = ("--data", "data", "--model-options", sizes, "--out", name, "--devices", devices)
        assert vision(*words, *more) == 0
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_is_followed(kind, tmp_path) -> None:
    """With all the weight on a teacher the student learns what it says, not the labels."""
    root = write_folder(tmp_path / "photos", count=6)
    assert vision("--data", root, "--out", "teacher", "--steps", 40) == 0
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for old, new in (("cat", "dog"), ("dog", "owl"), ("owl", "cat")):
        (root / old).rename(swapped / new)
    words = ("--data", swapped, "--teacher", "teacher", "--distillation", kind)
    assert vision(*words, "--teacher-weight", 1, "--steps", 40, "--out", "student") == 0
    # Held-out labels are the swapped ones: a student of the teacher gets them wrong.
    assert figures(tmp_path / "teacher")["test_accuracy"] > 0.9
    assert figures(tmp_path / "student")["test_accuracy"] < 0.3


def test_two_classifiers_learn_apart(tmp_path) -> None:
    root = write_folder(tmp_path / "photos", count=6)
    assert vision("--data", root, "--out", "teacher", "--steps", 6) == 0
    sizes = '{"depths": [1, 1, 1, 2], "embed_dims": [16, 24, 32, 40]}'
    words = ["train", "vision", "--data", str(root), "--model", "efficientformer_l1",
             "--model-options", sizes, "--image-size", "64", "--batch-size", "4", "--steps", "6",
             "--eval-every", "6", "--teacher", "teacher", "--out"]  # fmt: skip
    assert main([*words, "hard"]) == 0
    assert main([*words, "soft", "--distillation", "soft", "--temperature", "2"]) == 0
    model = load_model("hard")
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    assert main(["predict", "hard", str(root)]) == 0


def test_a_teacher_of_other_classes_is_refused_before_any_work(tmp_path, capsys) -> None:
    first = write_folder(tmp_path / "first")
    other = write_folder(tmp_path / "other", classes=("ant", "bee"))
    assert vision("--data", first, "--out", "teacher", "--steps", 6) == 0
    capsys.readouterr()
    assert vision("--data", other, "--teacher", "teacher", "--out", "student") == 2
    assert "train it on images of the same classes" in capsys.readouterr().err
    assert vision("--data", other, "--teacher", "nothing", "--out", "student") == 2
    assert "holds no run of 'train vision'" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
    for flag, value in (("--teacher-weight", 1.5), ("--temperature", 0)):
        assert vision("--data", first, flag, value, "--out", "student") == 2
        assert flag[2:].replace("-", "_") in capsys.readouterr().err
