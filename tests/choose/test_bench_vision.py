"""`manyheads bench --vision`: equal outputs before any time, and a record that says what ran."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from manyheads.choose.bench import vision
from manyheads.cli import main
from manyheads.models import create_model

SMALL = {"depths": (1, 1, 1, 1), "embed_dims": (8, 12, 16, 24)}


@pytest.fixture
def _small_models(monkeypatch) -> None:
    """The same paths with models that take milliseconds."""

    def against_timm(name, of_timm, changes) -> dict[str, nn.Module]:
        ours = create_model("poolformer_s12", **SMALL, **changes).eval()
        return {"timm": ours, "eager": ours, "fused": ours.fuse()}

    def build(name, **changes) -> nn.Module:
        heads = {"num_heads": (1, 2, 2, 3), "mlp_ratios": (3, 3, 2, 2), "image_size": 64}
        return create_model(name, **SMALL, **heads, **changes)

    monkeypatch.setattr(vision, "_SIDE", 64)
    monkeypatch.setattr(vision, "_OF_TIMM", {"poolformer_s12": ("poolformer_s12", {})})
    monkeypatch.setattr(vision, "_against_timm", against_timm)
    monkeypatch.setattr(vision, "_TWO_SIZES", {"poolformer_s12": SMALL})
    plain, eager = build("transnext_tiny", implementation="reference"), build("transnext_tiny")
    plain.load_state_dict(eager.state_dict())
    forms = {"plain": plain.eval(), "eager": eager.eval(), "fused": eager.fuse()}
    monkeypatch.setattr(vision, "_against_plain", lambda name: forms)
    monkeypatch.setattr(vision, "has_onnx", lambda: False)


@pytest.mark.usefixtures("_small_models")
def test_the_record(tmp_path, capsys) -> None:
    out = tmp_path / "vision.json"
    words = ["bench", "--vision", "--quick", "--threads", "1", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["command"] == "manyheads bench --vision --quick"
    assert record["quick"]
    found = record["vision"]
    assert [r["form"] for r in found["timm"]] == ["timm", "eager", "fused"]
    assert [r["form"] for r in found["plain"]] == ["plain", "eager", "fused"]
    assert all(r["difference"] < 1e-3 and r["median"] > 0 for r in found["timm"] + found["plain"])
    assert all(r["peak_bytes"] > 0 for r in found["plain"])
    (sizes,) = found["sizes"]
    assert sizes["growth"] == sizes["128"]["median"] / sizes["64"]["median"]
    assert found["onnx"] is None
    for words in ("faster than timm", "faster than plain", "128 px", "not measured"):
        assert words in shown


def test_unequal_forms_are_no_comparison() -> None:
    models = {"timm": nn.Identity(), "eager": nn.ReLU()}
    with pytest.raises(ValueError, match="volo_d1, eager: outputs differ"):
        vision._timed(models, "volo_d1", 1, 3)


@pytest.mark.parametrize("name", ["poolformer_s12", "efficientformer_l1"])
def test_the_real_models_are_equal_to_timms(name) -> None:
    """VOLO's equality is tested with the model; it takes seconds at full size."""
    of_timm, changes = vision._OF_TIMM[name]
    models = vision._against_timm(name, of_timm, changes)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = models["timm"](x)
        for form, model in models.items():
            assert vision._difference(name, form, model(x), expected) < 1e-3
