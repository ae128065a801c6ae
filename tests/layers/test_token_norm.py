"""Norms of tokens by name: torch's own on full batches, blind to padding on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from compare import assert_close
from manyheads.layers.token_norm import TOKEN_NORMS, TokenBatchNorm, token_norm


def test_batch_norm_is_torchs_over_all_tokens() -> None:
    ours, theirs = TokenBatchNorm(5), nn.BatchNorm1d(5)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(torch.randn(5))
            q.copy_(p)
    for _ in range(3):
        x = torch.randn(3, 11, 5) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(a), theirs(b.mT).mT
        assert_close(y, expected, 1e-5)
        cotangent = torch.randn_like(y)
        (one,) = torch.autograd.grad((y * cotangent).sum(), a)
        (two,) = torch.autograd.grad((expected * cotangent).sum(), b)
        assert_close(one, two, 1e-4)
    assert_close(ours.running_mean, theirs.running_mean, 1e-5)
    assert_close(ours.running_var, theirs.running_var, 1e-5)
    assert_close(ours.eval()(x), theirs.eval()(x.mT).mT, 1e-5)


def test_batch_norm_does_not_count_padding() -> None:
    mask = torch.rand(3, 11) < 0.6
    x = torch.randn(3, 11, 5)
    one, two = TokenBatchNorm(5), TokenBatchNorm(5)
    noisy = x.masked_fill(~mask[..., None], 1e4)
    y = one(noisy, mask=mask)
    expected = two(x[mask][None])
    assert_close(y[mask], expected[0], 1e-5)
    for key, buffer in one.named_buffers():
        assert_close(buffer, two.get_buffer(key), 1e-5, key)
    empty = one(x, mask=torch.zeros_like(mask))
    assert torch.isfinite(empty).all()


@pytest.mark.parametrize("name", TOKEN_NORMS)
def test_names_build_and_take_a_mask(name) -> None:
    norm = token_norm(name, 6)
    x, mask = torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.bool)
    assert_close(norm(x, mask=mask), norm(x), 1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16 or name == "layer"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="'simplerms'"):
        token_norm("simplerm", 6)


def _share(rank: int, file: str, results: Any) -> None:
    """Normalise one's share of a batch of 4: one sequence, or three."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, cotangent = torch.randn(2, 4, 9, 5, generator=torch.Generator().manual_seed(1))
    share = slice(0, 1) if rank == 0 else slice(1, 4)
    part = x[share].clone().requires_grad_()
    norm = TokenBatchNorm(5, sync=True)
    y = norm(part)
    (y * cotangent[share]).sum().backward()
    results[rank] = (y.detach(), part.grad, norm.running_mean, norm.running_var)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_synchronised_processes_normalise_as_one(tmp_path) -> None:
    """Two processes with unequal shares: outputs, statistics and gradients of the whole batch."""
    context, file = torch.multiprocessing.get_context("spawn"), str(tmp_path / "store")
    with context.Manager() as manager:
        results = manager.dict()
        other = context.Process(target=_share, args=(1, file, results))
        other.start()
        _share(0, file, results)
        other.join(60)
        assert other.exitcode == 0
        shares = [results[0], results[1]]
    x, cotangent = torch.randn(2, 4, 9, 5, generator=torch.Generator().manual_seed(1))
    norm, x = TokenBatchNorm(5), x.requires_grad_()
    y = norm(x)
    (y * cotangent).sum().backward()
    assert_close(torch.cat([s[0] for s in shares]), y, 1e-5)
    assert_close(torch.cat([s[1] for s in shares]), x.grad, 1e-4)
    for share in shares:
        assert_close(share[2], norm.running_mean, 1e-5)
        assert_close(share[3], norm.running_var, 1e-5)
