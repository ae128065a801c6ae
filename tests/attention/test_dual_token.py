"""Dual tokens: definition, cost, positions."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close, relative_error
from manyheads.attention.dual_token import (
    DualTokenAttention,
    TokenModule,
    dual_token_reference,
    halvings,
)
from manyheads.attention.grid import GridShape, build_mixer, get_mixer
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import largest_tensor_numel
from manyheads.models import create_model


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize(("size", "steps"), [((12, 12), 2), ((13, 9), 1), ((5, 7), 0), ((2, 3), 0)])
def test_module_is_the_definition(size, steps, mix) -> None:
    module = TokenModule(20, 5, grid=3, steps=steps, alpha=0.3, mix=mix).double()
    x = torch.randn(2, *size, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
    found = []
    for parts in (module(x, g), dual_token_reference(module, x, g)):
        loss = sum(p.sin().sum() for p in parts)
        found.append((*parts, *torch.autograd.grad(loss, [x, g, *module.parameters()])))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert_close(a, b, 1e-9, f"result {i}")


def test_halvings() -> None:
    sizes = ((28, 28), (14, 14), (7, 7), (6, 6), (56, 57), (28, 13))
    assert [halvings(s, 7) for s in sizes] == [2, 1, 0, 0, 3, 0]


def test_global_tokens_know_their_places() -> None:
    """Their order matters in the module, and does not where attention alone reads them."""
    module = TokenModule(16, 4, grid=3, steps=1)
    x, g = torch.randn(1, 6, 6, 16), torch.randn(1, 9, 16)
    order = torch.randperm(9)
    parts, moved = module(x, g), module(x, g[:, order])
    assert relative_error(moved.x_global, parts.x_global) > 1e-2
    key, value = module.gb_kv(g).chunk(2, -1)
    query = module.gb_q(x).flatten(1, 2)
    read = module._attend(query, key, value)
    assert_close(module._attend(query, key[:, order], value[:, order]), read, 1e-5)


def test_nothing_grows_faster_than_the_places() -> None:
    layer = DualTokenAttention(16, 2, steps=2)
    g = torch.randn(1, 49, 16)
    largest = [
        largest_tensor_numel(
            lambda side=side: layer(torch.randn(1, side, side, 16), g)[0].sum().backward()
        )
        for side in (28, 56)
    ]
    assert largest[1] <= 4.1 * largest[0]


def test_a_mixer_of_any_backbone() -> None:
    model = create_model(
        "poolformer_s12",
        depths=(1, 1, 1, 1),
        embed_dims=(16, 24, 32, 64),
        mixers=("pool", "pool", "dual_token", "attention"),
        num_heads=(2, 2, 4, 2),
        num_classes=7,
    )
    assert model(torch.randn(1, 3, 96, 75)).shape == (1, 7)
    mixer = build_mixer("dual_token", 24, num_heads=3, grid=(28, 31))
    assert mixer.attention.token.steps == 2
    with torch.no_grad():
        counted = count_flops(mixer, torch.randn(2, 24, 28, 31)).total
    shape = GridShape(batch=2, dim=24, height=28, width=31, num_heads=3)
    assert counted == pytest.approx(get_mixer("dual_token").flops(shape), rel=0.01)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads 3"):
        TokenModule(16, 3)
    with pytest.raises(ValueError, match="weight of the old tokens"):
        TokenModule(16, 2, alpha=1.5)
    with pytest.raises(ValueError, match="4 global tokens"):
        TokenModule(16, 2, grid=3)(torch.randn(1, 6, 6, 16), torch.randn(1, 4, 16))
    with pytest.raises(ValueError, match="no option 'gird'"):
        build_mixer("dual_token", 16, num_heads=2, gird=3)
