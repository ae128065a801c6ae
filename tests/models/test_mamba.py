"""The Mamba language model: sizes, both namings, configs, streaming and precision."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.models import create_model
from manyheads.models.language.mamba import MambaForCausalLM, MambaLMConfig

SIZES = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
}
TINY = MambaLMConfig(vocab_size=30, embed_dim=20, num_layers=2, state_dim=4)


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_published_sizes_are_exact(name, count) -> None:
    assert create_model(name, device="meta").num_parameters() == count


@pytest.mark.parametrize("naming", ["state-spaces", "transformers"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_namings_go_both_ways(naming, tied) -> None:
    config = TINY.replace(tie_embeddings=tied)
    model, other = MambaForCausalLM(config).double(), MambaForCausalLM(config).double()
    weights = model.to_official(naming)
    key = {"state-spaces": "embedding", "transformers": "embeddings"}[naming]
    assert f"backbone.{key}.weight" in weights
    assert "backbone.layers.1.mixer.A_log" in weights
    other.load_official(weights)
    tokens = torch.randint(30, (2, 17))
    assert torch.equal(model(tokens), other(tokens))
    if tied:
        del weights["lm_head.weight"]
        other.load_official(weights)
        assert other.head.weight is other.embed.weight
    weights["backbone.layers.1.mixer.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unexpected"):
        other.load_official(weights)
    with pytest.raises(ValueError, match="did you mean 'transformers'"):
        model.to_official("transformer")  # type: ignore[arg-type]


def test_a_file_in_half_precision_loads_wide() -> None:
    model = MambaForCausalLM(TINY)
    half = {k: t.half() for k, t in model.to_official().items()}
    loaded = MambaForCausalLM(TINY).load_official(half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    model = model.bfloat16()
    assert model.layers[0].mixer.a_log.dtype == torch.float32


def test_configs_of_both_sources() -> None:
    ours = MambaLMConfig.from_official(
        {
            "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        }
    )  # fmt: skip
    assert ours == MambaLMConfig()
    ported = MambaLMConfig.from_official(
        {
            "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 1024,
            "num_hidden_layers": 48, "state_size": 16, "conv_kernel": 4, "expand": 2,
            "time_step_rank": 64, "time_step_min": 0.001, "time_step_max": 0.1,
            "time_step_floor": 0.0001, "time_step_scale": 1.0, "time_step_init_scheme": "random",
            "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
            "initializer_range": 0.1, "layer_norm_epsilon": 1e-5, "residual_in_fp32": True,
            "rescale_prenorm_residual": False, "vocab_size": 50279, "use_cache": True,
        }
    )  # fmt: skip
    expected = MambaLMConfig(
        embed_dim=1024, num_layers=48, dt_rank=64, init_std=0.1, vocab_size=50279
    )
    assert ported == expected
    inner = {"dt_rank": "auto", "d_state": 8, "bias": True, "layer": "Mamba1"}
    config = MambaLMConfig.from_official({"d_model": 64, "vocab_size": 9, "ssm_cfg": inner})
    assert (config.dt_rank, config.state_dim, config.proj_bias) == (None, 8, True)
    assert config.vocab_size == 16
    for wrong, match in (
        ({"rms_norm": False}, "rms_norm=False"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "'Mamba2' is no Mamba-1"),
        ({"d_modle": 64}, "did you mean 'd_model'"),
    ):
        with pytest.raises(ValueError, match=match):
            MambaLMConfig.from_official(wrong)


def test_padding_packing_and_streaming_change_no_token() -> None:
    model = MambaForCausalLM(TINY).double().eval()
    tokens, mask = torch.randint(30, (2, 33)), torch.ones(2, 33, dtype=torch.bool)
    mask[1, :9] = False
    with torch.no_grad():
        y = model(tokens, mask=mask)
        assert_close(y[1:, 9:], model(tokens[1:, 9:]), 1e-10)
        packed = torch.cat((tokens[0], tokens[1, 9:]))[None]
        together = model(packed, cu_seqlens=torch.tensor([0, 33, 57]))
        assert_close(together[0], y[mask], 1e-10)
        logits, state = model.update(tokens[:, :20], model.init_state(2), mask=mask[:, :20])
        parts = [logits]
        for token in tokens[:, 20:].unbind(1):
            one, state = model.step(token, state)
            parts.append(one[:, None])
    assert_close(torch.cat(parts, 1)[mask], y[mask], 1e-10)


def test_generation_follows_the_logits() -> None:
    model = MambaForCausalLM(TINY).double().eval()
    prompt = torch.randint(30, (2, 11))
    new = torch.stack(list(model.generate(prompt, max_new_tokens=6, temperature=0)), 1)
    logits = model(torch.cat((prompt, new), 1))
    assert torch.equal(logits[:, 10:-1].argmax(-1), new)


def test_the_residual_stays_wide_in_half_precision() -> None:
    wide = MambaForCausalLM(TINY).bfloat16().eval()
    narrow = MambaForCausalLM(TINY.replace(wide_residual=False)).bfloat16().eval()
    narrow.load_state_dict(wide.state_dict())
    exact = MambaForCausalLM(TINY).eval()
    exact.load_state_dict(wide.state_dict())
    tokens = torch.randint(30, (2, 40))
    out = wide(tokens)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact(tokens), 2e-2)
    seen = {}
    for name, model in (("wide", wide), ("narrow", narrow)):
        hook = model.norm.register_forward_pre_hook(lambda _, x, n=name: seen.update({n: x[0]}))
        model(tokens)
        hook.remove()
    assert (seen["wide"].dtype, seen["narrow"].dtype) == (torch.float32, torch.bfloat16)


def test_a_new_model_starts_as_published() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaLMConfig(vocab_size=500, embed_dim=64, num_layers=4))
    assert abs(float(model.embed.weight.detach().std()) - 0.02) < 1e-3
    limit = 128**-0.5 / 2  # uniform by the width, over sqrt(4 layers)
    largest = float(model.layers[0].mixer.out_proj.weight.detach().abs().max())
    assert 0.95 * limit < largest <= limit
