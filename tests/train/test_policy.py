"""Interpreters learn by policy gradients what an answer needs, and the recipe runs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from manyheads.cli import main
from manyheads.data.images import load_images
from manyheads.models import create_model, load_model
from manyheads.papers.ia_red2 import fit_needles, judge
from manyheads.train.ia_red2 import IARed2Options, _Curriculum
from manyheads.train.policy import dropping_loss
from train.compare_runs import figures

TINY = (
    "--steps", "12", "--eval-every", "6", "--batch-size", "8", "--image-size", "16",
    "--model-options",
    '{"groups": [1, 1], "embed_dim": 12, "num_heads": 2, "interpreter_heads": 3, "patch_size": 4}',
)  # fmt: skip


@pytest.fixture(scope="module")
def learnt():
    return judge(fit_needles(lambda text: None))


def test_the_interpreter_keeps_what_the_answer_needs(learnt) -> None:
    assert learnt["telling_kept"] > 0.9
    assert learnt["others_kept"] < 0.5


def test_dropping_loses_no_accuracy_where_chance_does(learnt) -> None:
    assert learnt["dense"] > 0.98
    assert learnt["dropped"] > learnt["dense"] - 0.01
    assert learnt["random"] < learnt["dropped"] - 0.2


def _model():
    sizes = {"groups": (1, 1), "embed_dim": 12, "num_heads": 2, "interpreter_heads": 3}
    return create_model("deit_small", **sizes, image_size=32, num_classes=5)


def test_stages_train_the_interpreters_up_to_theirs() -> None:
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for last, silent in ((0, [False, True]), (1, [False, False])):
        model = _model().unfreeze_interpreters()
        dropping_loss(model, x, labels, last=last).backward()
        assert [i.qk.weight.grad is None for i in model.interpreters] == silent
        assert model.blocks[0].attn.qkv.weight.grad.any()
    model = _model().unfreeze_interpreters()
    dropping_loss(model, x, labels, dense=True).backward()
    assert all(i.qk.weight.grad is None for i in model.interpreters)


def test_the_policy_leaves_the_backbone_to_the_cross_entropy() -> None:
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    found = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = _model().unfreeze_interpreters()
        generator = torch.Generator().manual_seed(1)
        loss = dropping_loss(model, x, labels, policy_weight=weight, generator=generator)
        loss.backward()
        found.append([p.grad for p in model.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_labels_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="class numbers"):
        dropping_loss(_model(), torch.randn(2, 3, 32, 32), torch.rand(2, 5))


def test_the_curriculum_goes_group_by_group() -> None:
    options = IARed2Options(steps=100, dense_share=0.4, penalties=(3.0, 5.0))
    curriculum = _Curriculum(options)
    curriculum.groups = 3
    stages = [curriculum.stage(s) for s in (0, 39, 40, 59, 60, 79, 80, 99)]
    assert [s for s, _ in stages] == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert [p for _, p in stages[2:]] == [3, 3, 5, 5, 5, 5]


def test_the_recipe_and_the_picture(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ia-red2", *TINY, "--out", "run"]) == 0
    found = figures(tmp_path / "run")
    assert found["test_images"] == 359
    assert 0 < found["kept_share"] <= 1
    assert 0 <= found["dense_accuracy"] <= 1
    model = load_model("run")
    with torch.no_grad():  # so that something is dropped
        for p in model.interpreters.parameters():
            p.normal_()
    model.save("run")
    Image.fromarray(load_images("builtin:digits").test.images[0]).save("digit.png")
    capsys.readouterr()
    assert main(["inspect", "drop", "digit.png", "--run", "run", "--out", "a/b.png"]) == 0
    shown = capsys.readouterr().out
    assert "group 2:" in shown
    assert "of 16 patches kept" in shown
    with Image.open("a/b.png") as picture:
        assert picture.size == (4 * 224 + 3 * 8, 224)
        assert len(picture.getcolors(1 << 20)) > 20


def test_released_weights_are_inspected_too(tmp_path, monkeypatch, capsys) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    weights = create_model("ia_red2_deit_small").to_official()
    save_file({k: t.clone() for k, t in weights.items()}, "w.safetensors")
    Image.new("RGB", (300, 240), (200, 30, 60)).save("red.png")
    words = ["inspect", "drop", "red.png", "--model", "deit_small", "--weights", "w.safetensors"]
    assert main([*words, "--out", "none", "--group", "1"]) == 0
    assert "196 of 196 patches kept (100%)" in capsys.readouterr().out
    assert main([*words, "--group", "4"]) == 2
    assert "group 4" in capsys.readouterr().err
    assert main(["inspect", "drop", "red.png"]) == 2
    assert "--run FOLDER" in capsys.readouterr().err
    assert main(["inspect", "drop", "no.png", *words[3:]]) == 2
    assert main([*words[:3], "--model", "volo_d1", "--weights", "w.safetensors"]) == 2
    assert "no interpreters" in capsys.readouterr().err


def test_mixed_images_are_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ia-red2", *TINY, "--mixup", "0.2"]) == 2
    assert "not right or wrong" in capsys.readouterr().err
    assert main(["train", "ia-red2", "--model", "volo_d1"]) == 2
    assert "no interpreters" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
