"""Gates of attention heads, by what they look at. B batch, N length, H heads, C dim, d = C / H.

=============  ================  ======================================  ======================
``gate``       ``gate_net``      logits                                  parameters
=============  ================  ======================================  ======================
constant                         one number a head                       H
per_token      linear            each head's own Linear(d, 1)            H (d + 1)
per_token      mlp               Linear(d, d // 4), ReLU, Linear(., 1)   H (n (d + 2) + 1)
per_token      mlp2              the same with n = d hidden units
per_token      all_features      one Linear(C, H)                        H (C + 1)
per_head       as per_token      averaged over the tokens                as per_token
=============  ================  ======================================  ======================
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import unknown_name
from manyheads.layers.keymap import Entry, merge, rename
from manyheads.layers.ragged import sequence_ids

__all__ = ["GATES", "GATE_NETS", "GateKind", "GateNet", "HeadGate"]

GateKind = Literal["per_token", "per_head", "constant", "none"]
GateNet = Literal["linear", "mlp", "mlp2", "all_features"]
GATES = ("per_token", "per_head", "constant", "none")
GATE_NETS = ("linear", "mlp", "mlp2", "all_features")


class HeadGate(nn.Module):
    """The logits of one gate a head (2306.12929), for all heads in one product.

    Args:
        dim: C, of the input that queries, keys and values are made of too.
        heads: H; C must be a multiple of it, but for "constant" and "all_features".
        kind: "per_token", "per_head" or "constant". "per_head" averages over all tokens, and so
            looks ahead; "all_features" is always by token.
        net: what makes logits of tokens.
        init: the openness that the gates start near, between 0 and 1, through the bias of
            "linear" and the number of "constant"; None: 0.5 for "constant", else torch's Linear.
        weight_std: standard deviation of the first weights (None: torch's Linear); small for
            models trained without gates.

    Raises:
        ValueError: an unknown kind or net, or sizes that do not fit.

    Example:
        >>> gate = HeadGate(64, 4, init=0.25)
        >>> gate(torch.randn(2, 10, 64)).shape
        torch.Size([2, 4, 10, 1])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kind: GateKind = "per_token",
        net: GateNet = "linear",
        init: float | None = None,
        weight_std: float | None = None,
    ) -> None:
        super().__init__()
        if kind not in GATES[:-1]:
            raise unknown_name("gate", kind, GATES[:-1])
        if net not in GATE_NETS:
            raise unknown_name("gate_net", net, GATE_NETS)
        if init is not None and not 0 < init < 1:
            raise ValueError(f"the openness {init} that gates start at must lie between 0 and 1")
        self.kind, self.net, self.heads = kind, net, heads
        self.init, self.weight_std = init, weight_std
        width = dim
        if kind != "constant" and net != "all_features":
            if dim % heads:
                raise ValueError(
                    f"dim {dim} is not a multiple of heads {heads}: net='all_features' needs no "
                    "split of the input"
                )
            width = dim // heads
            if net in ("mlp", "mlp2"):
                hidden = width // 4 if net == "mlp" else width
                if hidden < 1:
                    raise ValueError(f"net 'mlp' needs a head dim of at least 4, got {width}")
                self.hidden_weight = nn.Parameter(torch.empty(heads, hidden, width))
                self.hidden_bias = nn.Parameter(torch.empty(heads, hidden))
                width = hidden
        if kind != "constant":
            self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as torch's Linear does, or as ``init`` and ``weight_std`` say."""
        logit = None if self.init is None else math.log(self.init / (1 - self.init))
        if self.kind == "constant":
            self.bias.fill_(logit or 0.0)
            return
        for part in ("hidden_", "") if self.net in ("mlp", "mlp2") else ("",):
            weight, bias = getattr(self, f"{part}weight"), getattr(self, f"{part}bias")
            bound = weight.shape[-1] ** -0.5
            bias.uniform_(-bound, bound)
            if self.weight_std is None:
                weight.uniform_(-bound, bound)
            else:
                weight.normal_(std=self.weight_std)
        if self.net == "linear" and logit is not None:
            self.bias.fill_(logit)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return logits.

        Args:
            x: (B, N, C).
            mask: (B, N), True = a token that "per_head" averages over.
            cu_seqlens: (S + 1) borders of packed sequences, each averaged by itself.

        Returns:
            (B, H, N, 1); (B, H, 1, 1) of "per_head", (1, H, 1, 1) of "constant".
        """
        if self.kind == "constant":
            return self.bias[None, :, None, None]
        if self.net == "all_features":
            return F.linear(x, self.weight, self.bias).transpose(1, 2)[..., None]
        hidden = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, d)
        if self.net in ("mlp", "mlp2"):
            hidden = F.relu(hidden @ self.hidden_weight.mT + self.hidden_bias[:, None])
        logits = hidden @ self.weight[..., None] + self.bias[:, None, None]
        if self.kind == "per_token":
            return logits
        if cu_seqlens is not None:
            ids = sequence_ids(cu_seqlens, x.shape[1])
            sizes = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp_min(1).to(logits.dtype)
            sums = logits.new_zeros(1, self.heads, len(sizes), 1).index_add(2, ids, logits)
            return (sums / sizes[:, None])[:, :, ids]
        if mask is None:
            return logits.mean(2, keepdim=True)
        real = mask[:, None, :, None].to(logits.dtype)
        return (logits * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)

    def entries(self, ours: str, official: str) -> list[Entry]:
        """Return the rules of a key map: ``ours`` is this module, ``official`` the gate there."""
        if self.kind == "constant":
            return [rename(f"{ours}.bias", official)]
        if self.net == "all_features":
            return [rename(f"{ours}.{n}", f"{official}.{n}") for n in ("weight", "bias")]
        last = "2." if self.net in ("mlp", "mlp2") else ""

        def names(part: str) -> list[str]:
            return [f"{official}.{h}.{part}" for h in range(self.heads)]

        entries = [merge(f"{ours}.{n}", names(f"{last}{n}")) for n in ("weight", "bias")]
        if last:
            entries += [_stack(f"{ours}.hidden_{n}", names(f"0.{n}")) for n in ("weight", "bias")]
        return entries


def _stack(ours: str, officials: list[str]) -> Entry:
    return Entry(
        (ours,),
        tuple(officials),
        lambda *ts: (torch.stack(ts),),
        lambda t: tuple(p.clone() for p in t.unbind()),
    )
