"""Attention over listed blocks with a function on the scores: a few query blocks at a time.

Backward makes each chunk's scores again and differentiates them, the function included, so that
tensors which it holds (a learned bias) get their gradients; nothing of N x M is kept.

B batch, H heads, N queries, M keys, D head dim, V value dim, R rows of a chunk.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention.block_sparse.gathered import Chunk, Gathered, joined
from manyheads.attention.block_sparse.mods import ScoreMod
from manyheads.attention.block_sparse.visits import Visits
from manyheads.layers.blocks import cut

__all__ = ["attend_scored", "held_tensors"]

# Of a function's globals: what holds tensors, and no Python modules or classes.
_HOLDERS = (Tensor, nn.Module, functools.partial, types.FunctionType, dict, list, tuple)


def attend_scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visits: Visits,
    score_mod: ScoreMod,
    *,
    block_q: int,
    block_k: int,
) -> Tensor:
    """As ``attend_visits``, with ``score_mod`` on the scores of the blocks that are visited."""
    held = held_tensors(score_mod)
    out: Tensor = _Scored.apply(query, key, value, (visits, score_mod, block_q, block_k), *held)
    return out


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, given: Any, *held: Tensor
    ) -> Tensor:
        visits, score_mod, block_q, block_k = given
        gathered = Gathered(query, key, value, visits, None, block_q, block_k)
        q = cut(query, block_q).flatten(0, 2)
        out = q.new_empty(*q.shape[:2], value.shape[3])
        places = _Places(gathered, query, key, block_q)
        for chunk in gathered:
            keys, values = gathered.take(chunk)
            out[chunk.rows] = _attend(q[chunk.rows], keys, values, chunk, places, score_mod)
        ctx.save_for_backward(query, key, value)
        ctx.given, ctx.held = given, held
        return joined(out, query)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        visits, score_mod, block_q, block_k = ctx.given
        gathered = Gathered(query, key, value, visits, None, block_q, block_k)
        q, g = (cut(t, block_q).flatten(0, 2) for t in (query, grad))
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(gathered.key), torch.zeros_like(gathered.value)
        wanted = [t for t, need in zip(ctx.held, ctx.needs_input_grad[4:], strict=True) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        checked = False
        places = _Places(gathered, query, key, block_q)
        for chunk in gathered:
            with torch.enable_grad():
                leaves = [
                    t.detach().requires_grad_() for t in (q[chunk.rows], *gathered.take(chunk))
                ]
                out = _attend(leaves[0], leaves[1], leaves[2], chunk, places, score_mod)
            if not checked:
                _check_all_held(out, [*leaves, *ctx.held])
                checked = True
            grads = torch.autograd.grad(
                out, [*leaves, *wanted], g[chunk.rows], allow_unused=True, materialize_grads=False
            )
            a, b, c = (
                torch.zeros_like(t) if s is None else s for t, s in zip(leaves, grads, strict=False)
            )
            dq[chunk.rows] = a
            dk.index_add_(0, chunk.blocks, b.reshape(-1, *dk.shape[1:]))
            dv.index_add_(0, chunk.blocks, c.reshape(-1, *dv.shape[1:]))
            for i, more in enumerate(grads[3:]):
                if more is not None:
                    before = sums[i]
                    sums[i] = more if before is None else before + more
        found = iter(sums)
        own = (next(found) if need else None for need in ctx.needs_input_grad[4:])
        return (joined(dq, query), gathered.whole(dk, key), gathered.whole(dv, value), None, *own)


class _Places:
    """Positions of the queries and keys of a chunk; those of padding are the last real ones."""

    def __init__(self, gathered: Gathered, query: Tensor, key: Tensor, block_q: int) -> None:
        self._gathered, self._block_q = gathered, block_q
        self._last = query.shape[2] - 1, key.shape[2] - 1

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sample and head (R, 1, 1), queries (R, block_q, 1), keys (R, 1, n · block_k)."""
        g, device = self._gathered, chunk.columns.device
        q_idx = g.row[chunk.rows][:, None] * self._block_q + torch.arange(
            self._block_q, device=device
        )
        kv_idx = chunk.columns[..., None] * g.block_k + torch.arange(g.block_k, device=device)
        return (
            g.sample[chunk.rows][:, None, None],
            g.head[chunk.rows][:, None, None],
            q_idx.clamp(max=self._last[0])[..., None],
            kv_idx.flatten(1).clamp(max=self._last[1])[:, None],
        )


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, places: _Places, score_mod: ScoreMod
) -> Tensor:
    scores = torch.bmm(query, keys.mT)
    changed = score_mod(scores, *places.of(chunk))
    if not isinstance(changed, Tensor) or changed.shape != scores.shape:
        raise ValueError(
            "score_mod must return one number for each score: a function of the scores and "
            "positions that broadcasts over tensors, as score + bias[h, q_idx - kv_idx]"
        )
    scores = changed.to(query)
    if chunk.absent is not None:
        scores = scores.masked_fill(chunk.absent, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, values) / total.masked_fill(total == 0, 1)


def _check_all_held(out: Tensor, known: list[Tensor]) -> None:
    """Raise if a leaf with gradient takes part that is not known: its gradient would be lost."""
    ends = {t.grad_fn for t in known}
    nodes, seen = [out.grad_fn], set(ends)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is t for t in known):
            raise ValueError(
                f"score_mod reads a tensor of shape {tuple(leaf.shape)} with gradient that was not "
                "found in it: let it close over the tensor, or hand it over by functools.partial"
            )
        nodes += [following for following, _ in node.next_functions]


def held_tensors(function: Any) -> list[Tensor]:
    """Return the tensors with gradients that a function holds, each once.

    They are looked for in its closure, the globals that it names, its bound arguments and object,
    in modules' parameters, and in functions, lists, tuples and dicts of these.
    """
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    for value in _held(function, seen):
        found.setdefault(id(value), value)
    return list(found.values())


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, nn.Module):
        inside = [*value.parameters(), *value.buffers()]
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    elif isinstance(value, types.FunctionType):
        known = value.__globals__
        inside = [known[n] for n in value.__code__.co_names if isinstance(known.get(n), _HOLDERS)]
        inside += [cell.cell_contents for cell in value.__closure__ or ()]
        inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif callable(value) and not isinstance(value, type):
        inside = [getattr(value, "__self__", None), getattr(value, "__func__", None)]
        inside += list(getattr(value, "__dict__", {}).values())
    for item in inside:
        yield from _held(item, seen)
