"""IA-RED² on clips: joint attention gathers, divided attention masks, both ignore what is gone."""

from __future__ import annotations

import pytest
import torch

from manyheads.models import create_model
from manyheads.models.vision.ia_red2 import IARed2Video, IARed2VideoConfig
from manyheads.models.vision.ia_red2.blocks import DividedBlock


def _model(attention: str, **changes) -> IARed2Video:
    sizes = {"groups": (1, 1, 1), "embed_dim": 24, "num_heads": 2, "num_classes": 5, "frames": 3}
    config = IARed2VideoConfig(
        **sizes | {"image_size": (24, 16), "patch_size": 8, "attention": attention} | changes
    )
    model = IARed2Video(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_what_is_gone_changes_nothing(attention) -> None:
    model, x = _model(attention), torch.randn(2, 3, 3, 24, 16)
    policy = torch.rand(2, 19) < 0.5
    policy[:, 0] = True
    out = model.look(x, policies=[policy] * 3)
    # Places lie row by row, the frames of each next to each other.
    gone = ~policy[:, 1:].unflatten(1, (3, 2, 3)).permute(0, 3, 1, 2)  # (B, T, rows, columns)
    pixels = gone.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    spoilt = model.look(torch.where(pixels, 1e2, x), policies=[policy] * 3)
    assert torch.allclose(spoilt.logits, out.logits, atol=1e-5)
    assert torch.equal(spoilt.policies[0], policy)
    assert not torch.allclose(model.look(x, policies=[torch.ones(2, 19)] * 3).logits, out.logits)


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_a_new_model_drops_nothing_and_learns(attention) -> None:
    sizes = {"groups": (1, 1), "embed_dim": 24, "num_heads": 2, "num_classes": 5, "frames": 3}
    changes = {"image_size": 16, "patch_size": 8, "attention": attention}
    model = IARed2Video(IARed2VideoConfig(**sizes, **changes))
    x = torch.randn(2, 3, 3, 16, 24)
    assert model.look(x).cost.tolist() == [1, 1]
    assert model.heat_map(x).shape == (2, 3, 2, 3)
    model.unfreeze_interpreters()
    out = model.look(x, sample=True)
    (out.logits.square().sum() + sum(d.scores.sum() for d in out.decisions)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent
    with torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_saves_loads_and_maps_names(attention, tmp_path) -> None:
    model, x = _model(attention), torch.randn(1, 3, 3, 24, 16)
    model.save(tmp_path)
    assert torch.equal(IARed2Video.load(tmp_path)(x), model(x))
    official = model.to_official()
    assert ("model.blocks.2.temporal_attn.qkv.weight" in official) == (attention == "divided")
    assert torch.equal(_model(attention).load_official(official)(x), model(x))
    plain = {k: t for k, t in official.items() if k.startswith("model.")}
    with pytest.warns(UserWarning, match="no interpreters"):
        _model(attention).load_official(plain)
    with pytest.raises(ValueError, match=r"missing .model\.time_embed"):
        model.load_official({k: t for k, t in official.items() if k != "model.time_embed"})


def test_divided_blocks_are_timesformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

    config = transformers.TimesformerConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=48, num_frames=3, image_size=24,
        patch_size=8, attention_type="divided_space_time",
    )  # fmt: skip
    theirs = TimesformerLayer(config, 0).eval()
    ours = DividedBlock(24, 3, frames=3, mlp_ratio=2, norm_eps=config.layer_norm_eps).eval()
    names = {
        "temporal_attention.attention.qkv": "temporal_attn.qkv",
        "temporal_attention.output.dense": "temporal_attn.proj",
        "temporal_layernorm": "temporal_norm1",
        "temporal_dense": "temporal_fc",
        "attention.attention.qkv": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = {names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: t
               for k, t in theirs.state_dict().items()}  # fmt: skip
    ours.load_state_dict(weights)
    x = torch.randn(2, 1 + 9 * 3, 24)
    assert torch.allclose(ours(x), theirs(x)[0], atol=1e-5)


def test_wrong_clips_are_named() -> None:
    model = _model("joint")
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 24, 16\), expected .* and 3 frames"):
        model(torch.randn(2, 3, 4, 24, 16))
    with pytest.raises(ValueError, match="'axial' must be"):
        _model("axial")


def test_published_size() -> None:
    model = create_model("ia_red2_timesformer_base", device="meta")
    plain = model.num_parameters() - sum(p.numel() for p in model.interpreters.parameters())
    assert plain == 121_566_352  # TimeSformer-B, divided, 8 frames, 400 classes
