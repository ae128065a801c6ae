"""Layers in place of ``nn.Linear``: mixed from atoms, or of low rank. I inputs, O outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.few_rows import Linear, linear
from manyheads.layers.sharing.dictionary import AtomDictionary
from manyheads.layers.sharing.op import shared_linear

__all__ = ["LowRankLinear", "SharedLinear"]


class LowRankLinear(nn.Module):
    """y = (x Aᵀ) Bᵀ + b with A (r, I) and B (O, r). Lossy: the rank is at most r.

    Both start so that their product has the variance of an ``nn.Linear``'s weight.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= min(inputs, outputs):
            raise ValueError(f"rank {rank} must lie between 1 and {min(inputs, outputs)}")
        self.down = Linear(inputs, rank, bias=False)
        self.up = Linear(rank, outputs, bias=bias)
        with torch.no_grad():  # down keeps variance / 3, as nn.Linear: up brings it back once
            self.up.weight.mul_(3**0.5)

    @property
    def weight(self) -> Tensor:
        """The product (O, I)."""
        return self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class SharedLinear(nn.Module):
    """A linear layer mixed from atoms that belong to others, in place of ``nn.Linear``.

    It keeps a reference to its dictionaries, which are registered once on the whole model: state
    dicts, parameter counts and optimisers see them once. In evaluation without gradients the
    matrix is mixed once and kept until something it depends on changes (``keep``): the speed and
    the memory of a dense layer. Otherwise it is mixed on every call.

    Args:
        parts: a dictionary and the layer's row in it, for each part of the outputs in order.
        bias: over all outputs, or None.
        ranks: of a correction B_p A_p that is added to part p; 0 for none.
        keep: keep the mixed matrix in evaluation.
    """

    def __init__(
        self,
        parts: Sequence[tuple[AtomDictionary, int]],
        *,
        bias: Tensor | None = None,
        ranks: Sequence[int] = (),
        keep: bool = True,
    ) -> None:
        super().__init__()
        # A tuple hides the dictionaries from registration here.
        self._parts = tuple(parts)
        self.keep = keep
        self.ranks = tuple(ranks) or (0,) * len(self._parts)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for i, ((dictionary, _), rank) in enumerate(zip(self._parts, self.ranks, strict=True)):
            if rank:
                like = dictionary.atoms
                _, outputs, inputs = like.shape
                self.down[str(i)] = nn.Parameter(like.new_zeros(rank, inputs))
                self.up[str(i)] = nn.Parameter(like.new_zeros(outputs, rank))
        self._mixed: tuple[Any, Tensor] | None = None

    @property
    def in_features(self) -> int:
        return self._parts[0][0].atoms.shape[2]

    @property
    def out_features(self) -> int:
        return sum(dictionary.atoms.shape[1] for dictionary, _ in self._parts)

    @property
    def weight(self) -> Tensor:
        """The whole matrix (O, I), mixed now; gradients reach the atoms through it."""
        rows = []
        for i, (dictionary, layer) in enumerate(self._parts):
            own = dictionary.weight(layer)
            rows.append(own + self.up[str(i)] @ self.down[str(i)] if self.ranks[i] else own)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return self._factored(x)
        if self.keep and not any(t.is_inference() for t in self._sources()):
            return linear(x, self._kept(), self.bias)
        tokens = x.numel() // max(1, x.shape[-1])
        inputs, outputs = self.in_features, self.out_features
        if any(self.ranks) and tokens * (inputs + outputs) > inputs * outputs:
            # Of so many tokens the correction costs more than adding it to the matrix.
            return F.linear(x, self.weight, self.bias)
        return self._factored(x)

    def _factored(self, x: Tensor) -> Tensor:
        pairs = [dictionary.pair(layer) for dictionary, layer in self._parts]
        out = shared_linear(x, pairs, self.bias)
        return out + self._correction(x) if any(self.ranks) else out

    def _correction(self, x: Tensor) -> Tensor:
        pieces = []
        for i, (dictionary, _) in enumerate(self._parts):
            if self.ranks[i]:
                pieces.append(F.linear(F.linear(x, self.down[str(i)]), self.up[str(i)]))
            else:
                pieces.append(x.new_zeros(*x.shape[:-1], dictionary.atoms.shape[1]))
        return torch.cat(pieces, -1)

    def _sources(self) -> Iterator[Tensor]:
        for dictionary, _ in self._parts:
            yield from dictionary.sources()
        yield from self.down.values()
        yield from self.up.values()

    def _kept(self) -> Tensor:
        # Numbers written in place raise a tensor's version; moved ones lie elsewhere.
        key = [(t.data_ptr(), t._version, t.dtype, t.device) for t in self._sources()]
        if self._mixed is None or self._mixed[0] != key:
            self._mixed = key, self.weight
        return self._mixed[1]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._mixed = None
        return super().train(mode)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return an ordinary linear layer with the matrix and bias as they are now."""
        weight = self.weight
        dense = nn.utils.skip_init(
            Linear,
            weight.shape[1],
            weight.shape[0],
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        dense.weight.copy_(weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mixed": None}

    def extra_repr(self) -> str:
        atoms = [len(dictionary.atoms) for dictionary, _ in self._parts]
        return f"{self.in_features}, {self.out_features}, atoms={atoms}, ranks={self.ranks}"
