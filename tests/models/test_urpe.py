"""The URPE encoder: published sizes, shared tables, padding, official configs."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close, relative_error
from manyheads.models import create_model
from manyheads.models.language.urpe import URPEEncoder, URPEEncoderConfig

OFFICIAL = {
    "padding_idx": 1, "vocab_size": 31, "num_encoder_layers": 2, "embedding_dim": 24,
    "ffn_embedding_dim": 40, "num_attention_heads": 4, "dropout": 0.1, "attention_dropout": 0.2,
    "activation_dropout": 0.3, "max_seq_len": 20, "num_segments": 0,
    "use_position_embeddings": False, "encoder_normalize_before": True, "apply_bert_init": True,
    "activation_fn": "gelu", "rel_pos": True, "rel_pos_unique": True, "ur_attn": True,
    "ur_attn_unique": True, "rp_bucket": 64, "max_rp": 128, "ur_rp_bucket": 32, "ur_max_rp": 50,
    "batch": 2, "seq": 17,
}  # fmt: skip


def tiny(**options) -> URPEEncoder:
    sizes = {"vocab_size": 31, "embed_dim": 24, "num_heads": 4, "mlp_width": 40, "max_length": 20}
    return URPEEncoder(URPEEncoderConfig(**(sizes | {"num_layers": 2} | options))).eval()


def test_published_sizes() -> None:
    assert create_model("urpe_synthetic", device="meta").num_parameters() == 22_640_859
    untied = create_model("synthetic_vocab1000_untied", device="meta")
    assert untied.num_parameters() == 22_640_859 + 776_448
    plain = create_model("urpe_synthetic", device="meta", bias="none", multiplier="none")
    assert plain.num_parameters() == 22_640_859 - 6_120


def test_official_configs() -> None:
    config = URPEEncoderConfig.from_official(OFFICIAL)
    assert (config.num_layers, config.embed_dim, config.mlp_width) == (2, 24, 40)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.2, 0.3)
    assert (config.bias, config.multiplier, config.max_length) == ("unique", "unique", 20)
    bucketed = URPEEncoderConfig.from_official(
        OFFICIAL | {"rel_pos_unique": False, "ur_attn_unique": False, "activation_fn": "relu"}
    )
    assert (bucketed.bias, bucketed.bias_buckets) == ("bucketed", (64, 128))
    assert (bucketed.multiplier, bucketed.multiplier_buckets) == ("bucketed", (32, 50))
    assert bucketed.activation == "relu"
    without = URPEEncoderConfig.from_official(
        OFFICIAL | {"rel_pos": False, "ur_attn": False, "encoder_normalize_before": False}
    )
    assert (without.bias, without.multiplier, without.embed_norm) == ("none", "none", False)
    for change, message in (
        ({"max_seq": 3}, "max_seq_len"),
        ({"num_segments": 2}, "no segments"),
        ({"use_position_embeddings": True}, "no absolute positions"),
    ):
        with pytest.raises(ValueError, match=message):
            URPEEncoderConfig.from_official(OFFICIAL | change)
    with pytest.raises(ValueError, match="padding_id"):
        URPEEncoderConfig(padding_id=2000)
    with pytest.raises(ValueError, match="bucketed"):
        URPEEncoderConfig(bias="buckets")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "none"},
        {"multiplier": "none", "embed_norm": False},
        {"bias": "bucketed", "multiplier": "bucketed", "tie_embeddings": False},
    ],
)
def test_official_names_go_both_ways(options) -> None:
    model, other = tiny(**options), tiny(**options)
    official = model.to_official()
    assert official["encoder.lm_head.weight"].shape == (31, 24)
    assert ("encoder.sentence_encoder.rp_bias.weight" in official) == (
        options.get("bias", "unique") != "none"
    )
    other.load_official(official)
    tokens = torch.randint(2, 31, (2, 17))
    assert torch.equal(model(tokens), other(tokens))


def test_it_starts_with_c_one_and_can_start_at_random() -> None:
    model = tiny()
    assert (model.multiplier.weight == 1).all()
    assert 0.01 < model.bias.weight.std() < 0.03
    assert (model.embed.weight[1] == 0).all()
    tokens = torch.randint(2, 31, (2, 17))
    plain = tiny(multiplier="none")
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if k != "multiplier.weight"})
    assert torch.equal(model(tokens), plain(tokens)), (
        "C = 1 is the relative bias alone, bit for bit"
    )
    assert tiny(multiplier_init="normal").multiplier.weight.abs().max() < 0.2


def test_all_layers_share_the_two_tables() -> None:
    model = tiny(num_layers=3).double().train()
    assert [n for n, _ in model.named_parameters() if "multiplier" in n] == ["multiplier.weight"]
    logits = model(torch.randint(2, 31, (2, 20)))
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert (model.multiplier.weight.grad != 0).all(), "each distance of 20 places occurs"


def test_padding_is_never_read() -> None:
    model = tiny(multiplier_init="normal", init_std=0.3).double()
    tokens = torch.randint(2, 31, (3, 19))
    tokens[0, 14:] = 1
    logits = model(tokens)
    assert_close(logits[:1, :14], model(tokens[:1, :14]), 1e-12)
    mask = tokens != 1
    other = tokens.masked_fill(~mask, 5)
    assert_close(model(other, mask=mask)[mask], logits[mask], 1e-12)
    assert relative_error(model(other)[0, :14], logits[0, :14]) > 1e-3
    tokens[1] = 1
    logits = model(tokens)
    assert torch.isfinite(logits).all(), "a row of padding alone"
    assert_close(logits[2:], model(tokens[2:]), 1e-12)


def test_lengths() -> None:
    with pytest.raises(ValueError, match="max_length 20"):
        tiny()(torch.randint(2, 31, (1, 21)))
    assert tiny(beyond="clamp")(torch.randint(2, 31, (1, 33))).shape == (1, 33, 31)


def test_equal_tokens_and_places() -> None:
    """What the paper proves: a relative bias alone cannot tell places apart, a multiplier can."""
    tokens = torch.full((1, 20), 7)

    def spread(model: URPEEncoder) -> float:
        out = model.double()(tokens).detach()
        return float((out - out[:, :1]).abs().max())

    torch.manual_seed(0)
    model = tiny(init_std=0.3)
    assert spread(model) < 1e-12
    with torch.no_grad():
        model.multiplier.weight.normal_()
    assert spread(model) > 1e-2


def test_dropouts_are_for_training() -> None:
    tokens = torch.randint(2, 31, (2, 17))
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        model = tiny(**{name: 0.5})
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.equal(model(tokens), model(tokens)), name


def test_it_saves_and_compiles(tmp_path) -> None:
    model = tiny(bias="bucketed", beyond="clamp")
    model.save(tmp_path)
    tokens = torch.randint(1, 31, (2, 17))
    assert torch.equal(URPEEncoder.load(tmp_path)(tokens), model(tokens))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens), model(tokens), 1e-5)
