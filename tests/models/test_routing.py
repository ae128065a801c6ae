"""The Routing Transformer: sizes, generation, training, official configs."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.models import create_model, list_models
from manyheads.models.language.routing import RoutingLM, RoutingLMConfig, shift_right
from manyheads.models.language.routing_pytorch import (
    RoutingTransformerLM,
    RoutingTransformerLMConfig,
)

SIZES = {
    "pg19_local_cluster8k": 583_323_814,
    "pg19_local8k": 617_508_814,
    "wikitext103_local_cluster4k": 332_567_768,
    "enwik8_local_cluster8k": 171_810_050,
}


def small(**options) -> RoutingLM:
    sizes = {"vocab_size": 40, "embed_dim": 32, "num_layers": 3, "skip_first": 1}
    sizes |= {"local_heads": 2, "routing_heads": 2, "clusters": 3, "window": 5, "block": 6}
    return RoutingLM(RoutingLMConfig(**(sizes | {"mlp_width": 48} | options)))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_exact(name) -> None:
    model = create_model(name, device="meta")
    assert model.num_parameters(trainable=True) == SIZES[name]
    assert model.config.selection == "strict"


def test_all_variants_build() -> None:
    names = list_models("routing_*")
    assert len(names) == 11
    for name in names:
        assert create_model(name, device="meta").num_parameters() > 1e8


def test_image_models_have_a_plain_mlp_with_biases() -> None:
    """Counted by hand: the official code's count of the image configs is not known."""
    for name, layers, heads, routed, clusters in (
        ("cifar10_local_cluster", 12, 8, 4, 6),
        ("imagenet_local_cluster", 24, 16, 4, 8),
    ):
        dim, width, mlp, table = 1024, 1024 // heads, 2048, 2 * 513 + 1
        attention = 4 * dim**2 + width**2 + 4 * table * width + routed * clusters * width
        layer = attention + 2 * dim * mlp + mlp + dim + 4 * dim
        ends = 2 * 256 * dim + 256 + dim**2 + dim
        model = create_model(name, device="meta")
        assert model.num_parameters(trainable=True) == layers * layer + ends


@pytest.mark.parametrize("options", [{}, {"share_qk": False, "add_positions": True}])
def test_steps_equal_the_parallel_pass(options) -> None:
    model = small(**options).eval().double()
    tokens = shift_right(torch.randint(1, 40, (2, 50)))
    with torch.no_grad():
        whole = model(tokens)
        out, state = model.update(tokens[:, :13], model.init_state(2))
        parts = [out]
        for t in range(13, 50):
            out, state = model.step(tokens[:, t], state)
            parts.append(out[:, None])
    assert_close(torch.cat(parts, 1), whole, 1e-9)


def test_generation_is_greedy_of_the_whole() -> None:
    model = small().eval()
    prompt = torch.randint(1, 40, (2, 9))
    got = torch.stack(list(model.generate(prompt, max_new_tokens=6, temperature=0)), 1)
    for i in range(6):
        read = torch.cat((prompt, got[:, :i]), 1)
        assert torch.equal(model(read)[:, -1].argmax(-1), got[:, i])
    with pytest.raises(ValueError, match="strict"):
        next(small(selection="official").generate(prompt, max_new_tokens=1))


def test_the_published_selection_leaks_and_the_strict_one_does_not() -> None:
    tokens = torch.randint(1, 40, (1, 48))
    changed = torch.cat((tokens[:, :30], torch.randint(1, 40, (1, 18))), 1)
    for selection in ("strict", "official"):
        model = small(selection=selection, window=4).eval()
        same = torch.allclose(model(tokens)[:, :30], model(changed)[:, :30], atol=1e-6)
        assert same == (selection == "strict")


def test_training_lowers_the_loss_and_moves_centroids() -> None:
    model = small(residual_dropout=0.0, target_dropout=0.1, decay=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = torch.arange(1, 25).repeat(2)[None]
    start = model.layers[1].mixer.kmeans.means.clone()
    losses = []
    for _ in range(25):
        entropy, clustering = model.loss(tokens)
        (entropy + clustering).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(entropy))
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.layers[1].mixer.kmeans.means, start)
    assert float(clustering) > 0


@pytest.mark.parametrize(
    "options", [{}, {"mlp": "relu", "token_dim": 16, "routing_heads": 1, "strided_heads": 1}]
)
def test_official_names_and_files_go_both_ways(options, tmp_path) -> None:
    if "strided_heads" in options:
        options = options | {"selection": "official"}
    model, other = small(**options).eval(), small(**options).eval()
    official = model.to_official()
    other.load_official(official)
    tokens = torch.randint(1, 40, (1, 20))
    assert torch.equal(model(tokens), other(tokens))
    bare = {k: t for k, t in official.items() if "/ema_" not in k}
    assert torch.equal(small(**options).eval().load_official(bare)(tokens), model(tokens))
    model.save(tmp_path)
    assert torch.equal(RoutingLM.load(tmp_path).eval()(tokens), model(tokens))


def test_official_configs_are_read_strictly() -> None:
    with pytest.raises(ValueError, match="hash_items"):
        RoutingLMConfig.from_official({"vocab": 10, "hash_items": True})
    with pytest.raises(ValueError, match="query_shape"):
        RoutingLMConfig.from_official({"query_shapes": [3]})
    with pytest.raises(ValueError, match="pkm_layers"):
        RoutingTransformerLMConfig.from_official({"num_tokens": 5, "pkm_layers": [1]})
    with pytest.raises(ValueError, match="window_size"):
        RoutingTransformerLMConfig.from_official({"window_sizes": 5})


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "local_heads": (0, 2)},
        {"local_heads": 2, "gated": True, "token_dim": 16},
        {"is_causal": True, "share_qk": False, "tie_embeddings": True, "memory": 2},
    ],
)
def test_the_package_layout_trains_and_goes_both_ways(options) -> None:
    config = RoutingTransformerLMConfig(
        vocab_size=40, embed_dim=32, num_layers=2, max_length=32, num_heads=4, head_dim=8,
        window=8, **options,
    )  # fmt: skip
    model = RoutingTransformerLM(config)
    tokens = torch.randint(40, (2, 32))
    logits, loss = model.forward_with_loss(tokens)
    (logits.square().mean() + loss).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.numel() or parameter.grad.abs().sum() > 0, name
    other = RoutingTransformerLM(config).load_official(model.to_official()).eval()
    assert torch.equal(other(tokens), model.eval()(tokens))
    with pytest.raises(ValueError, match="max_length"):
        model(torch.zeros(1, 33, dtype=torch.long))
