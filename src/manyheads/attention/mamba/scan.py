"""The selective scan in the layout and under the names of the official code.

B batch, E channels, L length, N state size, G groups.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.attention.mamba.definition import MambaState
from manyheads.attention.mamba.op import CHUNK_SIZE, mamba_update

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Run Mamba's selective scan on channels-first tensors; `mamba` in the official layout.

    s_t = exp(δ_t A) s_{t-1} + δ_t B_t u_t and y_t = C_t · s_t + D u_t, times silu(z_t), for each
    channel; the states are float32 at least, and (B, E, L, N) never exists (2312.00752).

    Args:
        u, delta: (B, E, L).
        a: (E, N), < 0, real.
        b, c: (B, N, L), or (B, G, N, L) for G groups of consecutive channels.
        d: (E), the weight of the skip connection.
        z: (B, E, L), the gate.
        delta_bias: (E), added to ``delta``.
        delta_softplus: whether to pass ``delta`` through softplus.
        initial_state: (B, E, N), zeros unless given.
        mask: (B, L), True = a real token.
        chunk_size: tokens a chunk; changes speed and memory, not the result.

    Returns:
        y (B, E, L) in the dtype of ``u``, and the state after the last token (B, E, N).

    Raises:
        ValueError: b or c does not depend on the input, rates are complex, or shapes do not fit.

    Example:
        >>> u, b = torch.randn(1, 8, 30), torch.randn(1, 4, 30)
        >>> y, state = selective_scan(u, torch.rand(1, 8, 30), -torch.ones(8, 4), b, b)
        >>> y.shape, state.shape
        (torch.Size([1, 8, 30]), torch.Size([1, 8, 4]))
    """
    if a.is_complex():
        raise ValueError("a is complex: only real rates of decay are supported, as Mamba has them")
    if u.ndim != 3:
        raise ValueError(f"u has {u.ndim} axes, expected (batch, channels, length)")
    b, c = _grouped("b", b), _grouped("c", c)
    groups, channels = b.shape[1], u.shape[1]
    if channels % groups:
        raise ValueError(f"{channels} channels are not a multiple of {groups} groups of b and c")
    if a.shape[0] != channels:
        raise ValueError(f"a has {a.shape[0]} channels, u has {channels}")

    def split(t: Tensor | None) -> Tensor | None:  # (B, E, L) to (B, G, L, V)
        return None if t is None else t.unflatten(1, (groups, -1)).mT

    def rows(t: Tensor | None) -> Tensor | None:  # (E, ·) to (G, V, ·)
        return None if t is None else t.unflatten(0, (groups, -1))

    value, steps, rates = split(u), split(delta), rows(a)
    assert value is not None
    assert steps is not None
    assert rates is not None
    state = None if initial_state is None else initial_state.unflatten(1, (groups, -1))
    out, (final,) = mamba_update(
        None if state is None else MambaState(state),
        c.mT, b.mT, value, steps, rates,
        skip=rows(d), gate=split(z), delta_bias=rows(delta_bias), delta_softplus=delta_softplus,
        mask=mask, chunk_size=chunk_size,
    )  # fmt: skip
    return out.mT.flatten(1, 2).to(u.dtype), final.flatten(1, 2)


def _grouped(name: str, t: Tensor) -> Tensor:
    if t.ndim == 3:
        return t[:, None]
    if t.ndim != 4:
        raise ValueError(
            f"{name} has {t.ndim} axes, expected (batch, state, length) or (batch, groups, state, "
            "length): a selective scan has one for each token; expand a constant one"
        )
    return t
