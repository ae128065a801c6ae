"""Routing attention beyond the contract: selections, states, centroids in training, limits."""

from __future__ import annotations

import copy
import socket
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compare import assert_close, relative_error
from manyheads.attention import (
    OnlineKMeans,
    RoutingAttention,
    RoutingConfig,
    SphericalKMeans,
    blocked_local,
    kmeans_sums,
    routing,
    routing_normalize,
    routing_reference,
    routing_select,
    routing_step,
    routing_update,
    spherical_routing,
)
from manyheads.attention.block_sparse import block_sparse
from manyheads.attention.routing import local_block_mask, routing_block_mask
from manyheads.choose.memory import largest_tensor_numel
from manyheads.layers.state import state_tensors


def draw(batch=2, heads=2, length=63, dim=6, value=5, clusters=4):
    q, k = (torch.randn(batch, heads, length, dim).double() for _ in range(2))
    v = torch.randn(batch, heads, length, value).double()
    return q, k, v, torch.randn(heads, clusters, dim).double()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 140),
    window=st.integers(1, 70),
    selection=st.sampled_from(["strict", "top", "official"]),
    is_causal=st.booleans(),
    is_shared=st.booleans(),
    strided=st.booleans(),
    relative=st.sampled_from([None, 0, 3, 200]),
    masked=st.booleans(),
)
def test_fast_forms_are_the_definition(
    length, window, selection, is_causal, is_shared, strided, relative, masked
) -> None:
    """Every selection, with windows that overflow and that do not; outputs and gradients."""
    torch.manual_seed(length + window)
    if selection == "strict":
        is_causal, strided = True, False
    q, k, v, means = draw(length=length)
    options = {"window": window, "is_causal": is_causal, "selection": selection}
    options |= {"strided": strided, "mask": torch.rand(2, length) < 0.7 if masked else None}
    tables = [] if relative is None else [torch.randn(2 * relative + 1, n) for n in (6, 5)]
    results = []
    for fn in (routing, routing_reference):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, *[t.double() for t in tables])]
        named = dict(zip(("relative_key", "relative_value"), leaves[3:], strict=False))
        key = leaves[0] if is_shared else leaves[1]
        out = fn(leaves[0], key, leaves[2], means, **options, **named)
        weight = torch.linspace(-1, 1, out.numel()).double().view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("window", [3, 40])
@pytest.mark.parametrize("is_shared", [True, False])
def test_blocks_and_steps_of_padded_rows_equal_one_call(window, is_shared) -> None:
    q, k, v, means = draw(batch=3, length=80)
    k = q if is_shared else k
    tables = {"relative_key": torch.randn(9, 6), "relative_value": torch.randn(9, 5)}
    mask = torch.rand(3, 80) < 0.7
    mask[:, 60:] = True
    whole = routing(q, k, v, means, window=window, is_causal=True, mask=mask, **tables)
    state, parts = None, []
    for a, b in pairwise([0, 11, 12, 60]):
        block = [t[:, :, a:b] for t in (q, k, v)]
        out, state = routing_update(
            state, *block, means, window=window, mask=mask[:, a:b], **tables
        )
        parts.append(out)
    for t in range(60, 80):
        out, state = routing_step(state, q[:, :, t], k[:, :, t], v[:, :, t], means, **tables)
        parts.append(out[:, :, None])
    assert_close(torch.cat(parts, 2), whole, 1e-9)
    _, final = routing_update(None, q, k, v, means, window=window, mask=mask)
    for a, b in zip(state_tensors(state), state_tensors(final), strict=True):
        assert torch.equal(a, b) or relative_error(a, b) < 1e-12


def test_steps_are_differentiable() -> None:
    q, k, v, means = draw(length=12)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    _, state = routing_update(None, *(t[:, :, :4] for t in leaves), means, window=3)
    outs = []
    for t in range(4, 12):
        out, state = routing_step(state, *(x[:, :, t] for x in leaves), means)
        outs.append(out)
    whole = routing(*leaves, means, window=3, is_causal=True)[:, :, 4:]
    weight = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad((torch.stack(outs, 2) * weight).sum(), leaves),
        torch.autograd.grad((whole * weight).sum(), leaves),
        strict=True,
    ):
        assert_close(a, b, 1e-9)


def test_only_the_strict_selection_hides_the_future() -> None:
    """With a small window, later tokens push earlier ones out of the published selection."""
    q, _, v, means = draw(length=60)
    changed = torch.cat((q[:, :, :40], torch.randn_like(q[:, :, 40:])), 2)
    for selection in ("strict", "top", "official"):
        a, b = (
            routing(x, x, v, means, window=6, is_causal=True, selection=selection)
            for x in (q, changed)
        )
        error = relative_error(b[:, :, :40], a[:, :, :40])
        assert (error < 1e-12) == (selection == "strict"), selection


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_cluster_of_everything_is_dense_attention(is_causal) -> None:
    q, k, v, _ = draw(length=50)
    means = torch.randn(2, 1, 6).double()
    out = routing(q, k, v, means, window=50, is_causal=is_causal)
    a, b = routing_normalize(q), routing_normalize(k)
    dense = F.scaled_dot_product_attention(a, b, v, is_causal=is_causal, scale=1.0)
    assert_close(out * 1.01, dense, 1e-9)


def test_equal_distances_take_the_lowest_places() -> None:
    distances = torch.tensor([3.0, 1, 2, 1, 1, 2, 1, 3])[None, None, :, None]
    for size, expected in ((3, [1, 3, 4]), (5, [1, 2, 3, 4, 6]), (6, [1, 2, 3, 4, 5, 6])):
        assert routing_select(distances, size)[0, 0, 0].tolist() == expected
    zeros = torch.zeros(1, 1, 1000, 2)
    assert routing_select(zeros, 7)[0, 0].tolist() == [list(range(7))] * 2
    assert routing_select(zeros, 4, strided=True)[0, 0, 0].tolist() == [0, 250, 500, 750]


def test_nothing_quadratic_is_made() -> None:
    q = v = torch.randn(1, 1, 4096, 8)
    means, window = torch.randn(1, 64, 8), 64
    for options in ({"is_causal": True}, {"is_causal": True, "selection": "top"}, {}):
        numel = largest_tensor_numel(lambda o=options: routing(q, q, v, means, window=window, **o))
        assert numel <= 2 * 4096 * window
    assert largest_tensor_numel(lambda: blocked_local(q, q, v, block=64, flange=64)) <= 4096 * 192


def test_a_token_that_nobody_chooses_gives_zero() -> None:
    q, k, v, means = draw(length=40, clusters=2)
    out = routing(q, k, v, means, window=5)
    chosen = routing_select(-(routing_normalize(q) @ means.mT), 5).flatten(2)
    hit = torch.zeros(2, 2, 40).scatter(2, chosen, 1.0).bool()
    assert (out[~hit] == 0).all()
    assert (out[hit] != 0).all()


def test_errors_name_the_axis() -> None:
    q, k, v, means = draw()
    with pytest.raises(ValueError, match="strict"):
        routing(q, k, v, means, selection="strict")
    with pytest.raises(ValueError, match="means has shape"):
        routing(q, k, v, means[:1])
    with pytest.raises(ValueError, match="relative_key"):
        routing(q, k, v, means, relative_key=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="heads"):
        routing(q, k[:, :1], v[:, :1], means)
    with pytest.raises(ValueError, match="official"):
        routing(q[:1], k[:1], v[:1], means, selection="official", cu_seqlens=torch.tensor([0, 63]))
    layer = RoutingAttention(RoutingConfig(embed_dim=24, num_heads=4, selection="official"))
    with pytest.raises(ValueError, match="streaming"):
        layer.init_state(1)


# Centroids in training


def layer(**options) -> RoutingAttention:
    config = {"embed_dim": 24, "num_heads": 4, "clusters": 3, "window": 8, "block": 8}
    return RoutingAttention(RoutingConfig(**(config | {"decay": 0.5} | options)))


def test_centroids_find_separated_directions() -> None:
    kmeans = OnlineKMeans(1, 4, 8, decay=0.5)
    directions = routing_normalize(torch.eye(8)[:4])
    kmeans.means.copy_(routing_normalize(directions + 0.5 * torch.randn(4, 8))[None])
    kmeans.ema_means.copy_(kmeans.means)
    for _ in range(30):
        x = directions[torch.randint(4, (200,))] + 0.2 * torch.randn(200, 8)
        kmeans.observe(routing_normalize(x)[None, None])
        kmeans.update_centroids()
    assert (F.cosine_similarity(kmeans.means[0], directions) > 0.95).all()


def test_evaluation_moves_nothing() -> None:
    module = layer().eval()
    before = copy.deepcopy(module.state_dict())
    module(torch.randn(2, 20, 24))
    module.update_centroids()
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


@pytest.mark.parametrize("selection", ["strict", "official"])
def test_micro_batches_make_one_step_as_the_whole_batch_does(selection) -> None:
    one, many = layer(selection=selection), layer(selection=selection)
    many.load_state_dict(one.state_dict())
    for module, parts in ((one, 1), (many, 4)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x = torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(0))
        for batch in x:
            for part in batch.chunk(parts):
                y, loss = module.forward_with_loss(part)
                ((y.square().mean() + loss) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        module.update_centroids()
    for name, buffer in one.named_buffers():
        assert_close(dict(many.named_buffers())[name], buffer, 1e-5, name)
    assert one.kmeans.ema_count.sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_forward_that_checkpointing_repeats_is_not_counted(reentrant) -> None:
    plain, saving = layer(), layer()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 24, requires_grad=True)
    for _ in range(2):
        plain(x).sum().backward()
        checkpoint(saving, x, use_reentrant=reentrant).sum().backward()
    for module in (plain, saving):
        module.update_centroids()
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(saving.named_buffers())[name], buffer), name


def test_the_next_batch_after_a_step_applies_what_waits() -> None:
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters())
    first = module.kmeans.means.clone()
    module(torch.randn(2, 16, 24)).sum().backward()
    module(torch.randn(2, 16, 24)).sum().backward()
    assert torch.equal(module.kmeans.means, first)
    optimizer.step()
    module(torch.randn(2, 16, 24))
    assert not torch.equal(module.kmeans.means, first)


def test_centroids_trained_by_gradient() -> None:
    module = layer(ema=False)
    _, loss = module.forward_with_loss(torch.randn(2, 16, 24))
    loss.backward()
    assert module.kmeans.means.grad.abs().sum() > 0
    assert {n for n, _ in module.named_buffers()} == set()


def test_averages_stay_wide() -> None:
    module = layer().bfloat16()
    assert module.q_proj.weight.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for b in module.buffers())
    assert module(torch.randn(1, 16, 24).bfloat16()).dtype == torch.bfloat16


def test_padding_and_zero_rows_are_no_members() -> None:
    x, means = torch.randn(2, 3, 10, 6), torch.randn(3, 4, 6)
    x[0, 1, 3] = 0
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 7:] = False
    count, total = kmeans_sums(x, means, mask=mask)
    assert count.sum(-1).tolist() == [17, 16, 17]
    assert_close(total.sum(1), (x * mask[:, None, :, None]).sum((0, 2)), 1e-5)


def _process(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    module = torch.nn.parallel.DistributedDataParallel(layer())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    for batch in x:
        for part in batch[rank::2].chunk(2):
            (module(part).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    module.module.update_centroids()
    torch.save(dict(module.module.named_buffers()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_move_their_centroids_as_one(tmp_path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1)):
        module(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    module.update_centroids()
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, buffer in module.named_buffers():
            assert_close(saved[name], buffer, 1e-4, f"{name} of process {rank}")


# The PyTorch package's variant


def test_means_are_placed_once_and_follow() -> None:
    kmeans = SphericalKMeans(2, 3, 6, decay=0.9)
    x = F.normalize(torch.randn(2, 2, 40, 6), dim=-1)
    kmeans.eval().place(x)
    assert not kmeans.is_placed
    kmeans.train().place(x)
    placed = kmeans.means.clone()
    assert kmeans.is_placed
    assert_close(placed.norm(dim=-1), torch.ones(2, 3), 1e-5)
    kmeans.place(torch.randn(2, 2, 40, 6))
    assert torch.equal(kmeans.means, placed)
    kmeans.observe(F.normalize(torch.randn(2, 2, 40, 6), dim=-1))
    kmeans.update_centroids()
    assert not torch.equal(kmeans.means, placed)


def test_shared_keys_see_themselves_only_if_nothing_else() -> None:
    q, v = torch.randn(1, 1, 12, 6), torch.randn(1, 1, 12, 6)
    means = F.normalize(torch.randn(1, 1, 6), dim=-1)
    out = spherical_routing(q, q, v, means, window=12, is_causal=True, share_qk=True)
    assert_close(out[0, 0, 0], v[0, 0, 0], 1e-4)
    assert_close(out[0, 0, 1], v[0, 0, 0], 1e-4)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 140),
    block=st.integers(1, 50),
    flange=st.integers(0, 90),
    is_causal=st.booleans(),
    masked=st.booleans(),
    double=st.booleans(),
)
def test_local_heads_are_block_sparse_attention(
    length, block, flange, is_causal, masked, double
) -> None:
    """Without tables they run on the map; with tables of zeros in a form of their own."""
    torch.manual_seed(length + block)
    dtype = torch.float64 if double else torch.float32
    tensors = [t.to(dtype).requires_grad_() for t in draw(length=length)[:3]]
    mask = None
    if masked:
        mask = torch.rand(2, length) < 0.7
        mask[:, -1] = True
    options = {"block": block, "flange": flange, "is_causal": is_causal, "scale": 0.3}
    zeros = torch.zeros(7, 6, dtype=dtype)
    out = blocked_local(*tensors, mask=mask, **options)
    wanted = blocked_local(*tensors, mask=mask, relative_key=zeros, **options)
    limit = 1e-12 if double else 1e-5
    assert_close(out, wanted, limit)
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, tensors, weight), torch.autograd.grad(wanted, tensors, weight),
        strict=True,
    ):  # fmt: skip
        # Of a query that sees one key alone both are rounding.
        if float(theirs.abs().max()) > 1e-6:
            assert_close(ours, theirs, 10 * limit)
    if mask is None:
        there = local_block_mask(length, block=block, flange=flange, is_causal=is_causal)
        assert_close(block_sparse(*tensors, there, scale=0.3), wanted, limit)
        i = torch.arange(length)
        start, end = i // block * block - flange, (i // block + 1) * block + flange
        seen = (i >= start[:, None]) & (i < (i + 1 if is_causal else end)[:, None])
        assert torch.equal(there.to_dense()[0, 0], seen)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("window", [1, 9, 200])
def test_strict_routing_is_block_sparse_attention_in_order_of_clusters(is_shared, window) -> None:
    q, k, v, means = draw(length=90)
    k = q if is_shared else k
    wanted = routing(q, k, v, means, window=window, is_causal=True)
    mask, query_order, key_order = routing_block_mask(q, k, means, window=window, block_size=16)

    def sort(x, order):
        return x.gather(2, order[..., None].expand_as(x))

    out = block_sparse(
        sort(routing_normalize(q), query_order), sort(routing_normalize(k), key_order),
        sort(v, key_order), mask, scale=1.0,
    )  # fmt: skip
    assert_close(out / 1.01, sort(wanted, query_order), 1e-12)
    if window == 9 and is_shared:
        assert mask.sparsity > 0.5
    with pytest.raises(ValueError, match="window 0"):
        routing_block_mask(q, k, means, window=0)
    with pytest.raises(ValueError, match="block 0"):
        local_block_mask(9, block=0, flange=1)
