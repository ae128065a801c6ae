"""Learned values by relative position: tables for lines, windows and graphs.

A table holds one row a relative position and one column a head, (rows, H), as official
checkpoints do. It serves as a bias inside a softmax or as a multiplier behind one (URPE).
H heads, N queries, M keys, distance = key place − query place.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.errors import unknown_name

__all__ = [
    "Beyond",
    "IndexedTable",
    "RelativeTable",
    "RelativeTable2d",
    "parameter_groups",
    "relative_position_bucket",
]

Beyond = Literal["error", "clamp"]
_BEYOND = ("error", "clamp")
_STD = 0.02


def relative_position_bucket(distance: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """Return signed buckets: exact for near distances, logarithmic up to ``max_distance``.

    With n = |distance|, half = num_buckets / 2 and exact = num_buckets / 4: n itself below
    ``exact``, then exact + floor(ln(n / exact) / ln(max_distance / exact) · (half − exact)), at
    most half − 1; times the sign of the distance.

    Args:
        distance: integers of any shape.
        num_buckets: a multiple of 2, at least 4.
        max_distance: from here on all distances share the last bucket.

    Raises:
        ValueError: a size that leaves no exact bucket or no room for the logarithm.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    if num_buckets % 2 or exact < 1:
        raise ValueError(f"num_buckets {num_buckets} must be even and at least 4")
    if max_distance <= exact:
        raise ValueError(
            f"max_distance {max_distance} must exceed the {exact} exact buckets "
            f"of num_buckets {num_buckets}"
        )
    n = distance.abs()
    # In float32 and in this order, so that borders between buckets fall as in official code.
    steps = torch.log(n.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (steps * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(n < exact, n, far) * distance.sign()


class _Table(nn.Module):
    """``weight`` (rows, H), drawn from N(0, 0.02) or constant."""

    def __init__(self, heads: int, rows: int, init: float | Literal["normal"], beyond: str) -> None:
        super().__init__()
        if isinstance(init, str) and init != "normal":
            raise unknown_name("init", init, ("normal",))
        if beyond not in _BEYOND:
            raise unknown_name("beyond", beyond, _BEYOND)
        self.init, self.beyond = init, beyond
        self.weight = nn.Parameter(torch.empty(rows, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the table to its initial values again."""
        if isinstance(self.init, str):
            nn.init.normal_(self.weight, std=_STD)
        else:
            nn.init.constant_(self.weight, self.init)

    def _gather(self, rows: Tensor) -> Tensor:
        """Rows (..., N, M) to values (..., H, N, M)."""
        values = self.weight.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return values.movedim(-1, -3)

    def extra_repr(self) -> str:
        rows, heads = self.weight.shape
        return f"heads={heads}, rows={rows}, init={self.init}, beyond={self.beyond!r}"


class RelativeTable(_Table):
    """Values by the distance between two places on a line.

    Unique form: one row a distance, row = distance + max_length − 1, 2 · max_length − 1 rows.
    Bucketed form: buckets of :func:`relative_position_bucket`, those of distances >= 0 moved up
    by 2, minus the least on the grid of ``max_length`` places: num_buckets + 1 rows, of which
    those next to distance 0 stay unused, as in official checkpoints.

    Args:
        heads: H.
        max_length: length R that the table covers, distances −(R − 1) to R − 1.
        buckets: (num_buckets, max_distance) for the bucketed form.
        init: "normal" for N(0, 0.02), or a constant: 0 for a bias, 1 for a multiplier.
        beyond: "error" or "clamp" (the farthest row serves) for distances that R does not cover.

    Example:
        >>> table = RelativeTable(4, 128, init=1.0)
        >>> table(10, 20).shape, table.toeplitz(10).shape
        (torch.Size([4, 10, 20]), torch.Size([4, 19]))
    """

    def __init__(
        self,
        heads: int,
        max_length: int,
        *,
        buckets: tuple[int, int] | None = None,
        init: float | Literal["normal"] = "normal",
        beyond: Beyond = "error",
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length {max_length} must be at least 1")
        rows = 2 * max_length - 1 if buckets is None else buckets[0] + 1
        super().__init__(heads, rows, init, beyond)
        self.max_length, self.buckets = max_length, buckets
        # A bucket grows with its distance: the least stands in the corner of the grid.
        corner = torch.tensor(1 - max_length, device="cpu")
        self.least = 0 if buckets is None else int(self._bucket(corner))

    def rows(self, distance: Tensor) -> Tensor:
        """Return the table's row of each distance.

        Raises:
            ValueError: in the "error" mode, a distance that ``max_length`` does not cover.
        """
        if not torch.compiler.is_compiling() and not distance.is_meta and distance.numel():
            self._check_reach(int(distance.abs().max()))
        return self._rows(distance)

    def toeplitz(self, length: int) -> Tensor:
        """Return values by distance −(length − 1) to length − 1, (H, 2 · length − 1).

        This is the form that ``urpe`` takes: no matrix is made.

        Raises:
            ValueError: in the "error" mode, a length above ``max_length``.
        """
        return self._range(1 - length, length)

    def forward(self, q_len: int, k_len: int | None = None, *, offset: int = 0) -> Tensor:
        """Return the matrix of values (H, N, M).

        Args:
            q_len, k_len: N and M (None: N).
            offset: place of the first query among the keys.

        Raises:
            ValueError: in the "error" mode, a distance that ``max_length`` does not cover.
        """
        k_len = q_len if k_len is None else k_len
        last = offset + q_len - 1
        line = self._range(-last, k_len - offset)  # (H, q_len + k_len - 1)
        places = torch.arange(k_len, device=line.device) + torch.arange(
            q_len - 1, -1, -1, device=line.device
        ).unsqueeze(1)
        return line[:, places]

    def _range(self, start: int, stop: int) -> Tensor:
        """Return values of distances start to stop − 1, (H, stop − start)."""
        self._check_reach(max(-start, stop - 1))
        if self.buckets is None and self.max_length > max(-start, stop - 1):
            zero = self.max_length - 1
            return self.weight[zero + start : zero + stop].T
        distance = torch.arange(start, stop, device="cpu")
        return self.weight.index_select(0, self._rows(distance).to(self.weight.device)).T

    def _rows(self, distance: Tensor) -> Tensor:
        reach = self.max_length - 1
        distance = distance.clamp(-reach, reach)
        return distance + reach if self.buckets is None else self._bucket(distance) - self.least

    def _bucket(self, distance: Tensor) -> Tensor:
        assert self.buckets is not None
        count, farthest = self.buckets
        signed = relative_position_bucket(distance, num_buckets=count, max_distance=farthest)
        return torch.where(signed >= 0, signed + 2, signed)

    def _check_reach(self, reach: int) -> None:
        if self.beyond == "error" and reach >= self.max_length:
            raise ValueError(
                f"distance {reach} is beyond max_length {self.max_length} of this table: "
                "build it longer, or with beyond='clamp'"
            )


class RelativeTable2d(_Table):
    """Values by the offset (dy, dx) between two places of a window, as in Swin (2103.14030).

    Row (dy + height − 1)(2 · width − 1) + dx + width − 1; (2 · height − 1)(2 · width − 1) rows.

    Args:
        heads: H.
        window: (height, width) that the table covers.
        init, beyond: as in :class:`RelativeTable`; "clamp" per axis.
    """

    def __init__(
        self,
        heads: int,
        window: tuple[int, int],
        *,
        init: float | Literal["normal"] = "normal",
        beyond: Beyond = "error",
    ) -> None:
        height, width = window
        if height < 1 or width < 1:
            raise ValueError(f"window {window} must be at least (1, 1)")
        super().__init__(heads, (2 * height - 1) * (2 * width - 1), init, beyond)
        self.window = (height, width)

    def rows(self, height: int | None = None, width: int | None = None) -> Tensor:
        """Return the row of each pair of places of a window, (h·w, h·w), row-major places."""
        sizes = (height or self.window[0], width or self.window[1])
        offsets = []
        for axis, size, most in zip(("height", "width"), sizes, self.window, strict=True):
            if self.beyond == "error" and size > most:
                raise ValueError(
                    f"{axis} {size} is beyond the window {self.window} of this table: "
                    "build it larger, or with beyond='clamp'"
                )
            line = torch.arange(size, device=self.weight.device)
            offsets.append((line - line[:, None]).clamp(1 - most, most - 1) + most - 1)
        (h, w), (dy, dx) = sizes, offsets
        rows = dy[:, None, :, None] * (2 * self.window[1] - 1) + dx[None, :, None, :]
        return rows.reshape(h * w, h * w)

    def forward(self, height: int | None = None, width: int | None = None) -> Tensor:
        """Return the matrix (H, h·w, h·w) of a window, the table's own size unless given.

        Raises:
            ValueError: in the "error" mode, a window larger than the table's.
        """
        return self._gather(self.rows(height, width))


class IndexedTable(_Table):
    """Values by an index that the caller computes for each pair, such as shortest-path distance.

    Args:
        heads: H.
        rows: indices 0 to rows − 1 have a value.
        init, beyond: as in :class:`RelativeTable`; "clamp" lets the last row serve larger ones.
    """

    def __init__(
        self,
        heads: int,
        rows: int,
        *,
        init: float | Literal["normal"] = "normal",
        beyond: Beyond = "error",
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows {rows} must be at least 1")
        super().__init__(heads, rows, init, beyond)

    def forward(self, index: Tensor) -> Tensor:
        """Return (H, N, M) of an index (N, M), or (B, H, N, M) of (B, N, M).

        Raises:
            ValueError: an index below 0, or in the "error" mode one without a row.
        """
        if index.ndim not in (2, 3):
            raise ValueError(f"index has {index.ndim} axes, expected (N, M) or (B, N, M)")
        last = self.weight.shape[0] - 1
        if not torch.compiler.is_compiling() and not index.is_meta and index.numel():
            low, high = (int(t) for t in index.aminmax())
            if low < 0 or (high > last and self.beyond == "error"):
                raise ValueError(
                    f"index {low if low < 0 else high} has no row among 0..{last}: give missing "
                    "pairs a row of their own, build more rows, or use beyond='clamp'"
                )
        return self._gather(index.clamp_max(last) if self.beyond == "clamp" else index)


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups in which tables of relative positions do not decay.

    Decay would pull a multiplier from 1 towards 0, which switches attention off.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    """
    tables = {id(m.weight): m.weight for m in module.modules() if isinstance(m, _Table)}
    rest = [p for p in module.parameters() if id(p) not in tables]
    return [
        {"params": rest, "weight_decay": weight_decay},
        {"params": list(tables.values()), "weight_decay": 0.0},
    ]
