"""Flow attention by its definition, and one token at a time.

B batch, H heads, N sinks (queries), M sources (keys and values), D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = [
    "FlowState",
    "Flows",
    "Kernel",
    "feature_map",
    "flow_flows",
    "flow_reference",
    "flow_step",
    "flow_weights",
]

Kernel = str | Callable[[Tensor], Tensor]

_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": lambda x: torch.relu(x) + 1e-6,
}


class Flows(NamedTuple):
    """What flows where: (B, H, N) of sinks (queries), (B, H, M) of sources (keys); 0 at padding.

    ``incoming``, ``outgoing``: total capacity into a sink, out of a source.
    ``conserved_sink``: what arrives at a sink when every source gives 1.
    ``conserved_source``: what leaves a source when every sink takes 1, before the clamp.
    ``sink_allocation``: weight of a sink in (0, 1). ``source_competition``: weight of a source,
    1 on average.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_sink: Tensor
    conserved_source: Tensor
    sink_allocation: Tensor
    source_competition: Tensor


class FlowState(NamedTuple):
    """The decoding state of one causal layer, float32 at least.

    ``key_sum``, ``query_sum``: sums of the mapped keys and queries, (B, H, D).
    ``key_flow``, ``query_flow``: the same sums with each term normalised by its own flow.
    ``competition``: log of the sum of exp(conserved source), (B, H).
    ``memory``: sum of k (c v)ᵀ, (B, H, D, V). ``length``: real tokens so far, (B,) integers.
    """

    key_sum: Tensor
    query_sum: Tensor
    key_flow: Tensor
    query_flow: Tensor
    competition: Tensor
    memory: Tensor
    length: Tensor


def feature_map(kernel: Kernel) -> Callable[[Tensor], Tensor]:
    """Return the non-negative map of that name, or ``kernel`` itself if it is a function.

    Raises:
        ValueError: unknown name; the nearest is given.
    """
    if callable(kernel):
        return kernel
    if kernel not in _KERNELS:
        raise unknown_name("kernel", kernel, _KERNELS)
    return _KERNELS[kernel]


def flow_flows(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Flows:
    """Return all flows of the network in which values are sources and results are sinks.

    Arguments as :func:`manyheads.attention.flow`. O(N D) time; half precision is computed and
    returned in float32.
    """
    work = torch.promote_types(query.dtype, torch.float32)
    phi = feature_map(kernel)
    q, k = phi(query.to(work)), phi(repeat_kv(key, query.shape[1]).to(work))
    if query_mask is None and (is_causal or query.shape[2] == key.shape[2]):
        query_mask = mask
    sinks = _real(query_mask, q)
    sources = _real(mask, k)
    q, k = q * sinks[..., None], k * sources[..., None]

    def total(x: Tensor) -> Tensor:
        return x.cumsum(2) if is_causal else x.sum(2, keepdim=True)

    def product(x: Tensor, flow: Tensor) -> Tensor:
        return ((x + eps) * (flow + eps)).sum(-1) + outer_eps

    number = sources.cumsum(-1).clamp_min(1) if is_causal else 1.0
    incoming, outgoing = product(q, total(k)), product(k, total(q))
    conserved_sink = product(q, total(k * (number / outgoing)[..., None])) / number
    conserved_source = product(k, total(q * (number / incoming)[..., None])) / number
    force = conserved_source if clamp is None else conserved_source.clamp(-clamp, clamp)
    force = force.masked_fill(sources == 0, torch.finfo(work).min)
    if is_causal:
        competition = number * (force - force.logcumsumexp(2)).exp()
        allocation = conserved_sink.sigmoid()
    else:
        count, sink_count = (t.sum(-1, keepdim=True) for t in (sources, sinks))
        competition = count * force.softmax(2)
        allocation = (conserved_sink * sink_count / count.clamp_min(1)).sigmoid()
    return Flows(
        incoming * sinks,
        outgoing * sources,
        conserved_sink * sinks,
        conserved_source * sources,
        allocation * sinks,
        competition * sources,
    )


def _real(mask: Tensor | None, x: Tensor) -> Tensor:
    """Return 1 at real tokens and 0 at padding, (B, 1, N)."""
    return x.new_ones(x.shape[0], 1, x.shape[2]) if mask is None else mask[:, None].to(x)


def flow_weights(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Return the implied attention matrix (B, H, N, M), O(N M) in memory: for looking.

    A_ij = a_i / I_i · (q_i · k_j) · c_j, for j <= i in the causal form; rows do not sum to 1.
    Arguments as :func:`manyheads.attention.flow`.
    """
    flows = flow_flows(
        query, key, is_causal=is_causal, kernel=kernel, eps=eps, clamp=clamp,
        outer_eps=outer_eps, mask=mask, query_mask=query_mask,
    )  # fmt: skip
    phi, work = feature_map(kernel), flows.incoming.dtype
    scores = phi(query.to(work)) @ phi(repeat_kv(key, query.shape[1]).to(work)).mT
    # Padded sinks have allocation 0 and incoming 0.
    sink = flows.sink_allocation / flows.incoming.masked_fill(flows.sink_allocation == 0, 1)
    weights = sink[..., None] * scores * flows.source_competition[..., None, :]
    return weights.tril() if is_causal else weights


def flow_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Flow attention through its N x M matrix: the oracle of the tests."""
    check_qkv(query, key, value, same_length=is_causal)
    weights = flow_weights(
        query, key, is_causal=is_causal, kernel=kernel, eps=eps, clamp=clamp,
        outer_eps=outer_eps, mask=mask, query_mask=query_mask,
    )  # fmt: skip
    return (weights @ repeat_kv(value, query.shape[1]).to(weights)).to(query.dtype)


def flow_step(
    state: FlowState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel = "sigmoid",
    eps: float = 1e-6,
    clamp: float | None = 1.0,
    outer_eps: float = 0.0,
) -> tuple[Tensor, FlowState]:
    """Add one token to the causal form in O(H D V) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (B, H, D).
        key, value: (B, H_kv, D and V).
        kernel, eps, clamp, outer_eps: as :func:`manyheads.attention.flow`.

    Returns:
        The output (B, H, V) and the next state.
    """
    memory, heads = state.memory, query.shape[1]
    phi = feature_map(kernel)
    q = phi(query.to(memory))
    k, v = phi(repeat_kv(key, heads).to(memory)), repeat_kv(value, heads).to(memory)
    length = state.length + 1
    number = length[:, None].to(memory)

    def product(x: Tensor, flow: Tensor) -> Tensor:
        return ((x + eps) * (flow + eps)).sum(-1) + outer_eps

    key_sum, query_sum = state.key_sum + k, state.query_sum + q
    incoming, outgoing = product(q, key_sum), product(k, query_sum)
    key_flow = state.key_flow + k * (number / outgoing)[..., None]
    query_flow = state.query_flow + q * (number / incoming)[..., None]
    allocation = (product(q, key_flow) / number).sigmoid()
    force = product(k, query_flow) / number
    if clamp is not None:
        force = force.clamp(-clamp, clamp)
    competition = torch.logaddexp(state.competition, force)
    strength = number * (force - competition).exp()
    memory = torch.addcmul(memory, k[..., None], (v * strength[..., None])[..., None, :])
    out = (q[..., None, :] @ memory).squeeze(-2) * (allocation / incoming)[..., None]
    state = FlowState(key_sum, query_sum, key_flow, query_flow, competition, memory, length)
    return out.to(query.dtype), state
