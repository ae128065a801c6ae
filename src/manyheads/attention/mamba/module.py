"""The Mamba-1 block: projection, short convolution, selective scan, gate.

B batch, N length, C embed_dim, E inner channels, W kernel size, R width of the step's projection,
G groups, D state size, V = E / G channels a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.mamba.definition import MambaState, mamba_step
from manyheads.attention.mamba.op import mamba_update
from manyheads.attention.mamba.token import block_step
from manyheads.config import Config
from manyheads.layers.conv import ShortConv
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask, map_packed

__all__ = ["MambaConfig", "MambaLayerState", "MambaMixer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaConfig(Config):
    """Sizes and options of a Mamba-1 block; the defaults are the published ones.

    Attributes:
        embed_dim: C.
        num_heads: G, groups of channels that share B and C; every published model has 1.
        is_causal: always True; kept so that all mixers are configured alike.
        state_dim: D, states of each channel.
        conv_size: W, width of the depthwise convolution.
        expand: E / C.
        dt_rank: R (None: C / 16, rounded up).
        dt_min, dt_max: range of the steps at the start, log-uniform.
        dt_floor: the least of them.
        dt_scale: the step's matrix starts within ± dt_scale / sqrt(R).
        dt_init: "random" (uniform) or "constant", how it is drawn.
        conv_bias, proj_bias: whether the convolution, and the input and output matrices, have
            biases.
    """

    embed_dim: int
    num_heads: int = 1
    is_causal: bool = True
    state_dim: int = 16
    conv_size: int = 4
    expand: float = 2
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_scale: float = 1.0
    dt_init: str = "random"
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        if not self.is_causal:
            raise ValueError("mamba has no bidirectional form: is_causal=False is not possible")
        if self.inner_dim % self.num_heads:
            raise ValueError(
                f"{self.inner_dim} inner channels (expand · embed_dim) are not a multiple of "
                f"num_heads {self.num_heads}"
            )
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init {self.dt_init!r} must be 'random' or 'constant'")

    @property
    def inner_dim(self) -> int:
        return int(self.expand * self.embed_dim)

    @property
    def rank(self) -> int:
        return math.ceil(self.embed_dim / 16) if self.dt_rank is None else self.dt_rank


class MambaLayerState(NamedTuple):
    """The decoding state of a block, as the official cache holds it.

    ``conv`` (B, E, W): the last W inputs of the convolution, newest last. ``ssm`` (B, E, D): the
    states, float32 at least.
    """

    conv: Tensor
    ssm: Tensor


class MambaMixer(SequenceMixer):
    """Mamba-1 block, a selective state space (2312.00752). Causal; needs training.

    The state is of constant size: E · (W + D) numbers. ``a_log`` and ``skip`` stay in float32
    when the rest is converted to half precision, since decays near 1 do not survive it.

    Example:
        >>> layer = MambaMixer(MambaConfig(embed_dim=64))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "mamba"
    config: MambaConfig

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = c = config
        inner = c.inner_dim
        self.in_proj = Linear(c.embed_dim, 2 * inner, bias=c.proj_bias)
        self.conv = ShortConv(inner, c.conv_size, bias=c.conv_bias, memory=c.conv_size)
        self.x_proj = Linear(inner, c.rank + 2 * c.num_heads * c.state_dim, bias=False)
        self.dt_proj = Linear(c.rank, inner)
        rates = torch.arange(1, c.state_dim + 1, dtype=torch.float32)
        self.a_log = nn.Parameter(rates.log().expand(inner, -1).clone())
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, c.embed_dim, bias=c.proj_bias)
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        c = self.config
        if self.conv.bias is not None:
            nn.init.uniform_(self.conv.bias, -(c.conv_size**-0.5), c.conv_size**-0.5)
        bound = c.dt_scale * c.rank**-0.5
        if c.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp_().clamp_min_(c.dt_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = {"a_log": self.a_log.data, "skip": self.skip.data}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                kept = before if before.is_meta else before.to(parameter.device)
                parameter.data = kept.to(torch.promote_types(before.dtype, torch.float32))
        return self

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
            (out,) = map_packed(lambda t, m: self(t, mask=m), (x,), cu_seqlens, dim=1)
            return out
        return self._mix(x, None, mask)[0]

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaLayerState:
        c, weight = self.config, self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        conv = self.conv.init_state(batch_size, device=device, dtype=dtype).mT
        ssm = torch.zeros(batch_size, c.inner_dim, c.state_dim, device=device, dtype=wide)
        return MambaLayerState(conv, ssm)

    def update(
        self, x: Tensor, state: MambaLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaLayerState]:
        return self._mix(x, state, mask)

    def step(self, x: Tensor, state: MambaLayerState) -> tuple[Tensor, MambaLayerState]:
        if (found := block_step(self, x, state.conv, state.ssm)) is not None:
            return found[0], MambaLayerState(*found[1:])
        (q, k, v, delta, z), conv = self._project(x[:, None], state.conv, None)
        q, k, v, delta, z = (t.squeeze(2) for t in (q, k, v, delta, z))
        rates, skip, bias = self._constants()
        out, memory = mamba_step(
            self._memory(state), q, k, v, delta, rates, skip=skip, gate=z, delta_bias=bias
        )
        y = self.out_proj(out.flatten(1).to(x.dtype))
        return y, MambaLayerState(conv, memory.memory.flatten(1, 2))

    def _mix(
        self, x: Tensor, state: MambaLayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MambaLayerState]:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        before = None if state is None else state.conv
        (q, k, v, delta, z), conv = self._project(x, before, mask)
        memory = None if state is None else self._memory(state)
        rates, skip, bias = self._constants()
        out, after = mamba_update(
            memory, q, k, v, delta, rates, skip=skip, gate=z, delta_bias=bias, mask=mask
        )
        y = self.out_proj(merge_heads(out).to(x.dtype))
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        return y, MambaLayerState(conv, after.memory.flatten(1, 2))

    def _project(
        self, x: Tensor, conv: Tensor | None, mask: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return C, B, x, δ before its bias, and z, as (B, G, N, ·); and the last W inputs."""
        c = self.config
        u, z = self.in_proj(x).chunk(2, -1)
        u, last = self.conv(u, None if conv is None else conv.mT, mask=mask)
        shared = c.num_heads * c.state_dim
        delta, k, q = self.x_proj(u).split((c.rank, shared, shared), -1)
        delta = F.linear(delta, self.dt_proj.weight)
        return tuple(split_heads(t, c.num_heads) for t in (q, k, u, delta, z)), last.mT

    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rates (G, V, D), the skip and the steps' bias (G, V)."""
        wide = torch.promote_types(self.a_log.dtype, torch.float32)
        tensors = (-self.a_log.to(wide).exp(), self.skip, self.dt_proj.bias)
        rates, skip, bias = (t.unflatten(0, (self.config.num_heads, -1)) for t in tensors)
        return rates, skip, bias

    def _memory(self, state: MambaLayerState) -> MambaState:
        return MambaState(state.ssm.unflatten(1, (self.config.num_heads, -1)))

    def key_map(self) -> KeyMap:
        """Names of state-spaces/mamba; transformers has the same inside a block."""
        return KeyMap(
            rename("a_log", "A_log"),
            rename("skip", "D"),
            rename("conv.weight", "conv1d.weight"),
            rename("conv.bias", "conv1d.bias"),
            *(
                rename(f"{name}.{kind}", f"{name}.{kind}")
                for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
                for kind in ("weight", "bias")
            ),
        )
