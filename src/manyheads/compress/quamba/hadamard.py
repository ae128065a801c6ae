"""Hadamard rotations of sizes K · 2^p: y H / sqrt(n) spreads an outlier over all channels.

Sylvester's transform along the fast axis of (K, 2^p), then a K x K base matrix on the slow one.
The base matrices are built, not stored: Paley's two constructions over a prime field, Sylvester's
doubling, and Williamson's array of four symmetric circulants, whose halves stand below. They are
those of N. J. A. Sloane's public library of Hadamard matrices. Exact and orthogonal:
(y H)(W H)ᵀ = y Wᵀ, so that a rotation folded into the next matrix costs nothing in float.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

__all__ = [
    "BASES",
    "base_matrix",
    "fold_hadamard",
    "hadamard_matrix",
    "hadamard_split",
    "hadamard_transform",
]

BASES = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
"""Sizes K of the base matrices, in the order in which they are tried."""

# The first m // 2 + 1 entries of the first rows of A, B, C, D; the rest follows by symmetry.
_WILLIAMSON = {
    52: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
    156: (
        "+++--+-+-----+--++--", "++++---+--++----+-+-",
        "+++--++-+---+-+--+--", "+---++-+-+-----+++-+",
    ),
    172: (
        "+---++--++++-+-+++-++-", "++-++++++----+-+--++-+",
        "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----",
    ),
}  # fmt: skip


def _circulant(row: Tensor) -> Tensor:
    return torch.stack([row.roll(i) for i in range(len(row))])


def _residues(prime: int) -> Tensor:
    """The quadratic character of 0 .. prime - 1: 0, then 1 for squares and -1 for others."""
    character = -torch.ones(prime)
    character[[i * i % prime for i in range(prime)]] = 1
    character[0] = 0
    return character


def _bordered(core: Tensor, corner: float, row: float, column: float) -> Tensor:
    wide = torch.cat((torch.full((len(core), 1), column), core), 1)
    top = torch.full((1, wide.shape[1]), row)
    top[0, 0] = corner
    return torch.cat((top, wide))


def _paley(prime: int) -> Tensor:
    """Size prime + 1, prime = 3 mod 4."""
    core = _circulant(_residues(prime)) + torch.eye(prime)
    return _bordered(core, 1, 1, -1).T.contiguous()


def _paley_double(prime: int) -> Tensor:
    """Size 2 (prime + 1), prime = 1 mod 4; symmetric."""
    core = _circulant(_residues(prime))
    same, other = core + torch.eye(prime), core - torch.eye(prime)
    upper = torch.cat((_bordered(same, 1, 1, 1), _bordered(other, -1, 1, 1)), 1)
    lower = torch.cat((_bordered(other, -1, 1, 1), _bordered(-same, -1, -1, -1)), 1)
    return torch.cat((upper, lower))


def _williamson(size: int) -> Tensor:
    m = size // 4
    halves = [torch.tensor([1.0 if c == "+" else -1.0 for c in s]) for s in _WILLIAMSON[size]]
    a, b, c, d = (_circulant(torch.cat((h, h[1:].flip(0)))[:m]) for h in halves)
    array = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in array])


@cache
def base_matrix(size: int) -> Tensor:
    """Return the base matrix of one of the sizes in `BASES` (or 1), (K, K) of ±1, float32.

    Raises:
        ValueError: no such base.
    """
    if size == 1:
        return torch.ones(1, 1)
    if size in (28, 36):
        return _paley_double(size // 2 - 1)
    if size == 40:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), _paley(19))
    if size in _WILLIAMSON:
        return _williamson(size)
    if size in BASES:
        return _paley(size - 1)
    raise ValueError(f"there is no base matrix of size {size}: bases are {sorted(BASES)}")


def hadamard_split(n: int) -> tuple[int, int]:
    """Return (K, 2^p) with n = K · 2^p.

    Raises:
        ValueError: n is no such product; the bases are named.

    Example:
        >>> hadamard_split(1536), hadamard_split(5120)
        ((12, 128), (40, 128))
    """
    for base in (*BASES, 1):
        if n > 0 and n % base == 0 and (n // base) & (n // base - 1) == 0:
            return base, n // base
    raise ValueError(
        f"size {n} has no Hadamard rotation: it must be K · 2^p with K one of 1, "
        f"{', '.join(map(str, sorted(BASES)))}; pass hadamard=False to go without"
    )


def hadamard_transform(x: Tensor, *, scale: float | None = None) -> Tensor:
    """Return x H / sqrt(n) along the last axis. Orthogonal: keeps lengths and inner products.

    Args:
        x: (..., n) with n = K · 2^p.
        scale: instead of 1 / sqrt(n).

    Returns:
        (..., n). About n (p + K) additions a row.

    Raises:
        ValueError: n has no rotation.

    Example:
        >>> x = torch.randn(3, 24)
        >>> torch.allclose(hadamard_transform(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        True
    """
    n = x.shape[-1]
    base, fast = hadamard_split(n)
    y = x.reshape(-1, base, fast)
    width = 1
    while width < fast:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    if base > 1:
        y = base_matrix(base).to(y) @ y
    return y.reshape(x.shape) * (1 / math.sqrt(n) if scale is None else scale)


def hadamard_matrix(n: int) -> Tensor:
    """Return H / sqrt(n), (n, n), such that ``hadamard_transform(x) = x @ hadamard_matrix(n)``.

    Raises:
        ValueError: n has no rotation.
    """
    return hadamard_transform(torch.eye(n))


@torch.no_grad()
def fold_hadamard(linear: nn.Linear) -> nn.Linear:
    """Rotate the input axis of a matrix in place: W becomes W H / sqrt(n). Lossless in float.

    What feeds the layer has to be rotated by :func:`hadamard_transform`. Returns ``linear``.

    Raises:
        ValueError: its input size has no rotation.
    """
    wide = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
    linear.weight.copy_(hadamard_transform(wide))
    return linear
