"""MixerLM and MixerEncoder with shared matrices: sizes, streaming, export, saving."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.models import create_model, load_model
from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig


def build(mixers: str = "softmax*6", **sharing) -> MixerLM:
    config = MixerLMConfig(
        vocab_size=50, embed_dim=60, num_heads=3, mixers=mixers, sharing={"atoms": 2, **sharing}
    )
    return MixerLM(config)


def build_encoder(mixers: str = "softmax*6", **sharing) -> MixerEncoder:
    config = MixerEncoderConfig(
        vocab_size=50, num_classes=7, embed_dim=60, num_heads=3, mixers=mixers,
        sharing={"atoms": 2, **sharing},
    )  # fmt: skip
    return MixerEncoder(config)


def attention_numbers(model: MixerLM | MixerEncoder) -> int:
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".mixer." in name or name.startswith("shared_atoms")
    )


@pytest.mark.parametrize(
    ("size", "layers", "dim", "total"),
    [("s", 12, 768, 109.5), ("m", 24, 1024, 334.8), ("l", 24, 1536, 728.6)],
)
def test_published_sizes(size, layers, dim, total) -> None:
    atoms = layers // 3
    made = {
        kind: create_model(f"masa_{kind}_{size}", device="meta")
        for kind in ("dense", "qkvo", "qkv", "repeat", "sequential", "low_rank", "gqa")
    }
    norms = (2 * layers + 1) * dim
    full = 4 * layers * dim * dim
    assert made["dense"].num_parameters() - norms == 3 * full + 32000 * dim
    assert round((made["dense"].num_parameters() - norms) / 1e6, 1) == total
    counts = {kind: attention_numbers(model) for kind, model in made.items()}
    assert counts["dense"] == full
    assert counts["qkvo"] == 4 * (atoms * dim * dim + atoms * layers)
    assert counts["qkv"] == 3 * (atoms * dim * dim + atoms * layers) + layers * dim * dim
    assert counts["repeat"] == counts["sequential"] == full // 3
    assert 0 <= full / 3 - counts["low_rank"] < full / 300
    assert round(100 - 100 * counts["gqa"] / full, 1) == {"s": 41.7, "m": 43.8, "l": 41.7}[size]


@pytest.mark.parametrize("mixers", ["softmax*6", "gla*4,softmax*2"])
@pytest.mark.parametrize("kind", ["masa", "repeat", "low-rank"])
def test_every_parameter_learns_and_streams(mixers, kind) -> None:
    model = build(mixers, kind=kind).double()
    tokens = torch.randint(50, (3, 33))
    model(tokens).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    model.eval()
    with torch.no_grad():
        whole = model(tokens)
        first, state = model.update(tokens[:, :20], model.init_state(3))
        steps = []
        for t in range(20, 33):
            logits, state = model.step(tokens[:, t], state)
            steps.append(logits)
    assert_close(torch.cat((first, torch.stack(steps, 1)), 1), whole, 1e-8)


@pytest.mark.parametrize("coefficients", ["direct", "network"])
def test_exports_are_the_model_to_the_bit(coefficients, tmp_path) -> None:
    model = build(coefficients=coefficients)
    tokens = torch.randint(50, (3, 33))
    expected = model(tokens)
    for dense in (True, False):
        made = model.export(dense=dense)
        assert torch.equal(made(tokens), expected)
        made.save(tmp_path / str(dense))
        loaded = load_model(tmp_path / str(dense))
        assert torch.equal(loaded(tokens), expected)
        assert loaded.num_parameters() == made.num_parameters()
    assert loaded.num_parameters() < made.num_parameters() + 1 < build().num_parameters() + 2
    dense_model = MixerLM(model.config.replace(sharing={}))
    assert model.export().num_parameters() == dense_model.num_parameters()
    assert model.config.sharing["coefficients"] == coefficients


def test_layers_of_other_shapes_share_among_themselves() -> None:
    model = build("gla*3,softmax*3")
    assert set(model.shared_atoms) >= {"query_0", "query_1", "value", "output"}
    with pytest.raises(ValueError, match="2 atoms for 1 layers"):
        build("gla*3,softmax")
    with pytest.raises(ValueError, match="did you mean 'kind'"):
        build(kindd="repeat")


@pytest.mark.parametrize("mixers", ["softmax*6", "gla*4,softmax*2"])
@pytest.mark.parametrize("kind", ["masa", "repeat", "sequential", "low-rank"])
def test_an_encoder_learns_every_parameter_and_reads_padding_alike(mixers, kind) -> None:
    """Of gla every other layer reads from the end, with the same atoms as those from the start."""
    model = build_encoder(mixers, kind=kind).double()
    tokens = torch.randint(50, (3, 33))
    model(tokens).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1, :9] = mask[2, 20:] = False
    with torch.no_grad():
        alone = torch.cat([model(t[None, m]) for t, m in zip(tokens, mask, strict=True)])
        assert_close(model.eval()(tokens, mask=mask), alone, 1e-8)
        borders = torch.tensor([0, 33, 57, 77])
        assert_close(model(tokens[mask][None], cu_seqlens=borders), alone, 1e-8)


def test_an_encoders_attention_has_the_numbers_of_its_atoms() -> None:
    full = 6 * 4 * 60 * 60
    counts = {k: attention_numbers(build_encoder(kind=k)) for k in ("masa", "repeat", "low-rank")}
    assert counts == {"masa": full // 3 + 4 * 6 * 2, "repeat": full // 3, "low-rank": full // 3}


@pytest.mark.parametrize("coefficients", ["direct", "network"])
def test_exports_of_an_encoder_are_the_model_to_the_bit(coefficients, tmp_path) -> None:
    model = build_encoder(coefficients=coefficients)
    tokens = torch.randint(50, (3, 33))
    expected = model(tokens)
    for dense in (True, False):
        made = model.export(dense=dense)
        made.save(tmp_path / str(dense))
        loaded = load_model(tmp_path / str(dense))
        assert torch.equal(made(tokens), expected)
        assert torch.equal(loaded(tokens), expected)
    assert "shared_atoms" not in dict(model.export().named_children())
    plain = MixerEncoder(model.config.replace(sharing={}))
    assert model.export().num_parameters() == plain.num_parameters()
    assert model.config.sharing["coefficients"] == coefficients
    with pytest.raises(ValueError, match="did you mean 'kind'"):
        build_encoder(kindd="repeat")
