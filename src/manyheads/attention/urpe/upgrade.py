"""Attention that exists already gets a relative multiplier C = 1 behind its softmax.

B batch, N queries, M keys, H heads, D head dim, E embed dim.

The upgraded module returns softmax(S) V + ((C − 1) ∘ softmax(S)) V: its first term is computed as
before, and the second is exactly 0 while C = 1, so that no bit changes until C is trained.
"""

from __future__ import annotations

from copy import deepcopy
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.softmax.module import SoftmaxAttention
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.attention.urpe.op import attend_cache, urpe
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename
from manyheads.layers.ragged import compact
from manyheads.layers.relative import Beyond, RelativeTable

__all__ = ["URPEMultiheadAttention", "URPESoftmaxAttention", "add_urpe"]

M = TypeVar("M", bound=nn.Module)
# Exactly these: a subclass may compute something else.
_KINDS: tuple[type[nn.Module], ...] = (SoftmaxAttention, nn.MultiheadAttention)


def add_urpe(
    module: M,
    *,
    max_length: int = 1024,
    buckets: tuple[int, int] | None = None,
    beyond: Beyond = "clamp",
    shared: bool = False,
    only: str = "*",
) -> M:
    """Return a copy of an attention, or of a model with attention in it, with C = 1 added.

    Outputs of every upgraded attention stay the same bit for bit until C is trained; until then
    and afterwards it costs a second pass. Give C its own learning rate, and no weight decay, by
    :func:`manyheads.layers.relative.parameter_groups`.

    Args:
        module: a ``SoftmaxAttention``, a ``torch.nn.MultiheadAttention``, or any module that
            contains some. It is not changed.
        max_length, buckets, beyond: of the :class:`RelativeTable` that holds C.
        shared: True: one table serves all, as in the published encoder.
        only: glob over the dotted names inside ``module``, such as ``"*self_attn"``.

    Raises:
        ValueError: nothing to upgrade, heads differ with ``shared``, or an option of
            MultiheadAttention (bias_k, add_zero_attn) that adds keys without a place.

    Example:
        >>> attention = add_urpe(torch.nn.MultiheadAttention(32, 4, batch_first=True))
        >>> attention.multiplier.weight.shape
        torch.Size([2047, 4])
    """
    names = [n for n, m in module.named_modules() if type(m) in _KINDS and fnmatchcase(n, only)]
    if not names:
        kinds = " and ".join(sorted(kind.__name__ for kind in _KINDS))
        raise ValueError(
            f"no attention to upgrade in {type(module).__name__} (only={only!r}): {kinds} can be"
        )
    table: RelativeTable | None = None
    result = deepcopy(module)
    for name in names:
        old = result.get_submodule(name)
        assert isinstance(old, SoftmaxAttention | nn.MultiheadAttention)
        heads = old.config.num_heads if isinstance(old, SoftmaxAttention) else old.num_heads
        if table is None or not shared:
            table = RelativeTable(heads, max_length, buckets=buckets, init=1.0, beyond=beyond)
            table.to(next(old.parameters()))
        elif table.weight.shape[1] != heads:
            raise ValueError(
                f"{name!r} has {heads} heads, the shared table {table.weight.shape[1]}: "
                "use shared=False"
            )
        new = _upgrade(old, table)
        if not name:
            return cast(M, new)
        owner, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(owner), leaf, new)
    for part in result.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # nested tensors reach fused kernels, which know no C
    return result


class URPESoftmaxAttention(SoftmaxAttention):
    """Softmax attention with a multiplier behind the softmax; made by :func:`add_urpe`."""

    def __init__(self, attention: SoftmaxAttention, multiplier: RelativeTable) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        self.multiplier = multiplier

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        table = self.multiplier.toeplitz(q.shape[2]) - 1
        causal = self.config.is_causal
        extra = urpe(q, k, v, multiplier=table, is_causal=causal, mask=mask, cu_seqlens=cu_seqlens)
        return super()._attend(q, k, v, mask, cu_seqlens) + extra

    def _attend_cache(
        self, cache: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        before = cache.length
        out, cache = super()._attend_cache(cache, q, k, v, mask)
        table = self.multiplier.toeplitz(int(before.max()) + q.shape[2]) - 1
        if mask is None:
            extra = attend_cache(q, cache.key, cache.value, before, None, table)
        else:
            moved = compact(mask)
            q = moved.gather(q, dim=2)
            extra = attend_cache(q, cache.key, cache.value, before, None, table)
            extra = moved.scatter(extra, dim=2).masked_fill(~mask[:, None, :, None], 0)
        return out + extra, cache

    def key_map(self) -> KeyMap:
        """Names of :class:`SoftmaxAttention`, and of URPE's table."""
        entries = super().key_map().entries
        return KeyMap(*entries, rename("multiplier.weight", "ur_rp_bias.weight"))


class URPEMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with a multiplier behind the softmax (see :func:`add_urpe`).

    Keys of the state dict stay as they were, beside ``multiplier.weight``. Distances are counted
    by place, masked keys included. Returned weights are the softmax alone, as in official code.
    """

    def __init__(self, attention: nn.MultiheadAttention, multiplier: RelativeTable) -> None:
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "MultiheadAttention with add_bias_kv or add_zero_attn has keys without a place: "
                "build it without them"
            )
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        self.multiplier = multiplier
        # TransformerEncoderLayer bypasses forward by a fused kernel unless there is a hook.
        self.register_forward_hook(_keep)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # Dropout must act on C ∘ softmax as a whole: then there is one term only.
        dropout_p = self.dropout if self.training else 0.0
        out, weights = None, None
        if dropout_p == 0 or need_weights:
            out, weights = super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        table = self.multiplier.toeplitz(
            max(query.shape[self._axis(query)], key.shape[self._axis(key)])
        )
        mixed = self._mix(
            query, key, value, key_padding_mask, attn_mask,
            table if dropout_p else table - 1, dropout_p,
        )  # fmt: skip
        if dropout_p:
            return F.linear(mixed, self.out_proj.weight, self.out_proj.bias), weights
        assert out is not None
        return out + F.linear(mixed, self.out_proj.weight), weights

    def _axis(self, x: Tensor) -> int:
        return 1 if x.ndim == 3 and self.batch_first else 0

    def _mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        table: Tensor,
        dropout_p: float,
    ) -> Tensor:
        """Return (table ∘ softmax) V with merged heads, laid out as ``query`` is."""
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = []
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
            x = x[None] if x.ndim == 2 else x if self.batch_first else x.transpose(0, 1)
            heads.append(split_heads(F.linear(x, weight, bias), self.num_heads))
        q, k, v = heads
        hidden = key_padding_mask
        if hidden is not None and hidden.ndim == 1:
            hidden = hidden[None]
        matrix = None if attn_mask is None else self._matrix(attn_mask, q)
        keep = None
        if hidden is not None and hidden.is_floating_point():
            row = hidden[:, None, None].expand(-1, -1, q.shape[2], -1)
            matrix = row if matrix is None else matrix + row
        elif hidden is not None:
            keep = ~hidden
        out = urpe(
            q, k, v, bias=matrix, multiplier=table, mask=keep, count_padding=True,
            dropout_p=dropout_p,
        )  # fmt: skip
        merged = merge_heads(out)
        if query.ndim == 2:
            return merged[0]
        return merged if self.batch_first else merged.transpose(0, 1)

    def _matrix(self, attn_mask: Tensor, q: Tensor) -> Tensor:
        """Return a mask of MultiheadAttention as a bias (1 or B, 1 or H, N, M)."""
        if not attn_mask.is_floating_point():
            hidden = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
            attn_mask = hidden.masked_fill(attn_mask, -torch.inf)
        if attn_mask.ndim == 2:
            return attn_mask[None, None]
        return attn_mask.unflatten(0, (-1, self.num_heads))


def _keep(module: nn.Module, args: object, output: object) -> None:
    return None


def _upgrade(old: SoftmaxAttention | nn.MultiheadAttention, table: RelativeTable) -> nn.Module:
    if isinstance(old, SoftmaxAttention):
        return URPESoftmaxAttention(old, table)
    return URPEMultiheadAttention(old, table)
