"""add_urpe: nothing changes before training, and C ∘ softmax is computed after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compare import assert_close, relative_error
from manyheads.attention import (
    GatedLinearAttention,
    GLAConfig,
    SoftmaxAttention,
    SoftmaxConfig,
    add_urpe,
    urpe_reference,
)
from manyheads.attention.urpe.upgrade import URPEMultiheadAttention, URPESoftmaxAttention
from manyheads.layers.relative import parameter_groups
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig

C, H, N = 40, 4, 31


def perturb(module: nn.Module) -> Tensor:
    table = module.get_parameter("multiplier.weight")
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    return table


def padding() -> Tensor:
    mask = torch.ones(3, N, dtype=torch.bool)
    mask[0, :6] = mask[1, 20:] = mask[2, 9:12] = False
    return mask


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "bias": True, "rotary_theta": None}])
def test_softmax_layers_keep_every_bit(is_causal: bool, options: dict) -> None:
    config = SoftmaxConfig(embed_dim=C, num_heads=H, is_causal=is_causal, **options)
    layer = SoftmaxAttention(config)
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    upgraded = add_urpe(layer, max_length=50)
    assert isinstance(upgraded, URPESoftmaxAttention)
    assert set(upgraded.state_dict()) == {*before, "multiplier.weight"}
    x, mask = torch.randn(3, N, C), padding()
    borders = torch.tensor([0, 4, 20, N])
    for inputs in ({}, {"mask": mask}):
        assert torch.equal(upgraded(x, **inputs), layer(x, **inputs))
    assert torch.equal(upgraded(x[:1], cu_seqlens=borders), layer(x[:1], cu_seqlens=borders))
    if is_causal:
        state, twin = layer.init_state(3), upgraded.init_state(3)
        for part in (slice(0, 20), slice(20, 21), slice(21, N)):
            out, state = layer.update(x[:, part], state, mask=mask[:, part])
            other, twin = upgraded.update(x[:, part], twin, mask=mask[:, part])
            assert torch.equal(out, other)
    perturb(upgraded)
    assert relative_error(upgraded(x), layer(x)) > 0.1
    for k, t in layer.state_dict().items():
        assert torch.equal(t, before[k]), "the original is not touched"


def test_a_trained_softmax_layer_streams() -> None:
    layer = add_urpe(SoftmaxAttention(SoftmaxConfig(embed_dim=C, num_heads=H))).double()
    perturb(layer)
    x, mask = torch.randn(3, N, C, dtype=torch.float64), padding()
    mask[:, 20:] = True
    with torch.no_grad():
        y = layer(x, mask=mask)
        out, state = layer.update(x[:, :20], layer.init_state(3), mask=mask[:, :20])
        parts = [out]
        for t in range(20, N):
            out, state = layer.step(x[:, t], state)
            parts.append(out[:, None])
    assert_close(torch.cat(parts, 1)[mask], y[mask], 1e-12)
    other = add_urpe(SoftmaxAttention(layer.config)).double()
    other.load_official(layer.to_official())
    assert torch.equal(other(x), layer(x))


MASKS = ["none", "causal", "float", "heads", "padding", "both", "float padding"]


def masks(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    causal = torch.ones(N, N, dtype=torch.bool).triu(1)
    floats = torch.randn(N, N, dtype=dtype)
    heads = torch.randn(3 * H, N, N, dtype=dtype)
    padded = ~padding()
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "float": {"attn_mask": floats},
        "heads": {"attn_mask": heads},
        "padding": {"key_padding_mask": padded},
        "both": {"attn_mask": torch.eye(N).bool(), "key_padding_mask": padded},
        "float padding": {"attn_mask": heads, "key_padding_mask": padded.to(dtype) * -3},
    }[kind]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_torch_attention_keeps_every_bit(kind: str, batch_first: bool, mode: str) -> None:
    layer = nn.MultiheadAttention(C, H, batch_first=batch_first).train(mode == "train")
    upgraded = add_urpe(layer, max_length=50)
    assert set(upgraded.state_dict()) == {*layer.state_dict(), "multiplier.weight"}
    x = torch.randn(3, N, C) if batch_first else torch.randn(N, 3, C)
    options = masks(kind, torch.float32)
    with torch.inference_mode(mode == "inference"):
        for need in (True, False):
            out, weights = layer(x, x, x, need_weights=need, **options)
            other, other_weights = upgraded(x, x, x, need_weights=need, **options)
            assert torch.equal(out, other)
            assert (weights is None) == (other_weights is None)
            if weights is not None:
                assert torch.equal(weights, other_weights)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_trained_torch_attention(kind: str, batch_first: bool) -> None:
    """Cross-attention of other widths, against the definition."""
    layer = nn.MultiheadAttention(C, H, kdim=12, vdim=8, batch_first=batch_first).double()
    with torch.no_grad():
        layer.in_proj_bias.normal_()
        layer.out_proj.bias.normal_()
    upgraded = add_urpe(layer, max_length=N)
    perturb(upgraded)
    x, k, v = (torch.randn(3, N, width, dtype=torch.float64) for width in (C, 12, 8))
    options = masks(kind, torch.float64)
    parts = [t if batch_first else t.transpose(0, 1) for t in (x, k, v)]
    out, _ = upgraded(*parts, need_weights=False, **options)
    out = out if batch_first else out.transpose(0, 1)

    matrices = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    q, k, v = (
        nn.functional.linear(t, w, b).unflatten(-1, (H, -1)).transpose(1, 2)
        for t, w, b in zip((x, k, v), matrices, layer.in_proj_bias.chunk(3), strict=True)
    )
    bias = torch.zeros(3, H, N, N, dtype=torch.float64)
    if "attn_mask" in options:
        own = options["attn_mask"]
        if own.dtype == torch.bool:
            own = torch.zeros(own.shape).masked_fill(own, -torch.inf).double()
        bias = bias + (own if own.ndim == 2 else own.unflatten(0, (3, H)))
    if "key_padding_mask" in options:
        own = options["key_padding_mask"]
        if own.dtype == torch.bool:
            own = torch.zeros(own.shape).masked_fill(own, -torch.inf).double()
        bias = bias + own[:, None, None]
    table = upgraded.multiplier.toeplitz(N)
    expected = urpe_reference(q, k, v, bias=bias, multiplier=table).transpose(1, 2).flatten(-2)
    assert_close(out, layer.out_proj(expected), 1e-12)
    single, _ = upgraded(x[0], parts[1][0] if batch_first else parts[1][:, 0],
                         parts[2][0] if batch_first else parts[2][:, 0])  # fmt: skip
    if kind == "none":
        assert_close(single, out[0], 1e-12)


def test_gradients_reach_the_table_at_one() -> None:
    upgraded = add_urpe(nn.MultiheadAttention(C, H, batch_first=True), max_length=N)
    x = torch.randn(2, N, C)
    upgraded(x, x, x)[0].square().sum().backward()
    grad = upgraded.multiplier.weight.grad
    assert grad is not None
    assert (grad.abs().sum(0) > 0).all()
    groups = parameter_groups(upgraded, weight_decay=0.1)
    assert groups[1]["params"] == [upgraded.multiplier.weight]


def test_dropout_acts_on_the_product() -> None:
    """In training the two terms would draw two masks: then there is one term."""
    layer = nn.MultiheadAttention(N, 1, dropout=0.5, batch_first=True, bias=False)
    with torch.no_grad():
        layer.in_proj_weight[2 * N :] = torch.eye(N)
        layer.out_proj.weight.copy_(torch.eye(N))
    upgraded = add_urpe(layer, max_length=N).train()
    perturb(upgraded)
    x = torch.eye(N)[None]
    out, weights = upgraded(x, x, x, need_weights=False)
    assert weights is None
    whole = upgraded.eval()(x, x, x)[0]
    kept = out != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert_close(out[kept], 2 * whole[kept], 1e-5)
    assert upgraded.train()(x, x, x)[1] is not None


@pytest.mark.parametrize("norm_first", [True, False])
def test_whole_torch_encoders(norm_first: bool) -> None:
    """Fused kernels of torch know no C and must not be taken."""
    layer = nn.TransformerEncoderLayer(C, H, 50, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    upgraded = add_urpe(model, max_length=N, shared=True)
    attention = [m for m in upgraded.modules() if isinstance(m, URPEMultiheadAttention)]
    assert len(attention) == 2
    assert attention[0].multiplier is attention[1].multiplier
    x, mask = torch.randn(3, N, C), ~padding()
    mask[0] = mask[2] = False  # left-aligned: torch would make a nested tensor of it
    with torch.no_grad():
        expected, out = (m(x, src_key_padding_mask=mask) for m in (model, upgraded))
        assert_close(out[~mask], expected[~mask], 1e-5)
        perturb(attention[0])
        changed = upgraded(x, src_key_padding_mask=mask)
    assert relative_error(changed[~mask], expected[~mask]) > 0.05
    assert not any(isinstance(m, URPEMultiheadAttention) for m in model.modules())


def test_some_attention_of_a_model() -> None:
    model = MixerLM(MixerLMConfig(embed_dim=C, num_heads=H, mixers="softmax,gla,softmax"))
    upgraded = add_urpe(model, only="layers.2.*")
    kinds = [type(layer.mixer) for layer in upgraded.layers]
    assert kinds == [SoftmaxAttention, GatedLinearAttention, URPESoftmaxAttention]
    tokens = torch.randint(256, (2, N))
    assert torch.equal(upgraded(tokens), model(tokens))
    perturb(upgraded.layers[2].mixer)
    logits = upgraded(tokens)
    streamed, state = upgraded.update(tokens[:, :20], upgraded.init_state(2))
    rest, _ = upgraded.update(tokens[:, 20:], state)
    assert_close(torch.cat((streamed, rest), 1), logits, 1e-4)


def test_what_cannot_be_upgraded() -> None:
    with pytest.raises(ValueError, match="no attention to upgrade in GatedLinearAttention"):
        add_urpe(GatedLinearAttention(GLAConfig(embed_dim=C)))
    layer = nn.MultiheadAttention(C, H)
    with pytest.raises(ValueError, match=r"only='x\*'"):
        add_urpe(nn.Sequential(layer), only="x*")
    with pytest.raises(ValueError, match="no attention to upgrade"):
        add_urpe(add_urpe(layer))
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="without a place"):
            add_urpe(nn.MultiheadAttention(C, H, **options))
    with pytest.raises(ValueError, match="shared=False"):
        add_urpe(nn.ModuleList([layer, nn.MultiheadAttention(C, 2)]), shared=True)
