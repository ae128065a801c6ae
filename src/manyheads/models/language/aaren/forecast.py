"""Forecasting: the next values of a series from everything seen so far, on a normalised scale.

B batch, N length, F channels, T horizon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.ragged import check_mask
from manyheads.models.language.aaren.tasks import AarenTaskConfig, AarenTaskModel, last_real
from manyheads.models.language.causal import LMState

__all__ = ["AarenForecaster", "AarenForecasterConfig", "ForecastState", "RunningMoments"]

_NORMALIZE = ("window", "running", "none")
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenForecasterConfig(AarenTaskConfig):
    """Sizes of the stack, and:

    Attributes:
        in_channels: F.
        horizon: T, values that are forecast at once.
        normalize: by mean and standard deviation of the "window" that is given (the paper
            normalises its inputs; a window has to be whole, so this does not stream), of all
            values so far ("running", streams), or "none".
    """

    in_channels: int
    horizon: int
    normalize: Literal["window", "running", "none"] = "running"

    def __post_init__(self) -> None:
        AarenTaskConfig.__post_init__(self)
        if self.normalize not in _NORMALIZE:
            raise unknown_name("normalize", self.normalize, _NORMALIZE)
        if self.horizon < 1:
            raise ValueError(f"horizon {self.horizon} must be at least 1")


class RunningMoments(NamedTuple):
    """Moments of the values read by each row, float64: ``number`` (B) of them and (B, F) tensors.

    ``shift`` is the first real value; ``total`` and ``squares`` are sums of differences from it.
    """

    number: Tensor
    shift: Tensor
    total: Tensor
    squares: Tensor


class ForecastState(NamedTuple):
    """``model`` and, where normalisation is running, ``moments``."""

    model: LMState
    moments: RunningMoments | None


class AarenForecaster(AarenTaskModel):
    """Forecasts the next T values of every channel.

    Example:
        >>> model = AarenForecaster(AarenForecasterConfig(in_channels=3, horizon=24))
        >>> model(torch.randn(2, 96, 3)).shape
        torch.Size([2, 24, 3])
    """

    config_class: ClassVar[type[Config]] = AarenForecasterConfig
    config: AarenForecasterConfig

    def __init__(self, config: AarenForecasterConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.in_channels, config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.horizon * config.in_channels)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return what follows the last real token: (B, T, F) of (B, N, F).

        Args:
            x: values at equal distances in time.
            mask: (B, N), True = a real token, at least one a row.
        """
        mask = check_mask(mask, x.shape[0], x.shape[1])
        mean, std, _ = self._moments(x, mask, None)
        hidden = self._encode(self.embed((x - mean) / std), mask)
        if self.config.normalize == "running":
            mean, std = last_real(mean, mask)[:, None], last_real(std, mask)[:, None]
        return self._head(last_real(hidden, mask)) * std + mean

    def every_prefix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return what follows each token, (B, N, T, F): N forecasts to train on at once.

        Raises:
            ValueError: the normalisation is that of the window, which looks ahead.
        """
        self._need_causal("every_prefix")
        mask = check_mask(mask, x.shape[0], x.shape[1])
        mean, std, _ = self._moments(x, mask, None)
        hidden = self._encode(self.embed((x - mean) / std), mask)
        return self._head(hidden) * std.unsqueeze(-2) + mean.unsqueeze(-2)

    def init_state(self, batch_size: int) -> ForecastState:
        """Return the state before the first token.

        Raises:
            ValueError: the normalisation is that of the window, which looks ahead.
        """
        self._need_causal("init_state")
        model, moments = self._first_state(batch_size), None
        if self.config.normalize == "running":
            device = self.embed.weight.device
            count = torch.zeros(batch_size, dtype=torch.float64, device=device)
            zeros = count.new_zeros(batch_size, self.config.in_channels)
            moments = RunningMoments(count, zeros, zeros.clone(), zeros.clone())
        return ForecastState(model, moments)

    def update(
        self, x: Tensor, state: ForecastState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, ForecastState]:
        """Read a block (B, N, F): what follows each token, (B, N, T, F), and the next state."""
        mask = check_mask(mask, x.shape[0], x.shape[1])
        mean, std, moments = self._moments(x, mask, state.moments)
        hidden, model = self._encode_update(self.embed((x - mean) / std), state.model, mask)
        out = self._head(hidden) * std.unsqueeze(-2) + mean.unsqueeze(-2)
        return out, ForecastState(model, moments)

    def step(self, x: Tensor, state: ForecastState) -> tuple[Tensor, ForecastState]:
        """Read one value a channel, (B, F): what follows, (B, T, F), and the next state."""
        out, state = self.update(x[:, None], state)
        return out[:, 0], state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).unflatten(-1, (self.config.horizon, self.config.in_channels))

    def _need_causal(self, what: str) -> None:
        if self.config.normalize == "window":
            raise ValueError(
                f"{what} needs a normalisation that does not look ahead: "
                "build the model with normalize='running' or 'none'"
            )

    def _moments(
        self, x: Tensor, mask: Tensor | None, before: RunningMoments | None
    ) -> tuple[Tensor, Tensor, RunningMoments | None]:
        """Return mean and deviation, (B, 1 or N, F), and the moments after the last token."""
        if self.config.normalize == "none":
            one = x.new_ones(x.shape[0], 1, x.shape[2])
            return torch.zeros_like(one), one, None
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
        if self.config.normalize == "window":
            count = real.sum(1, keepdim=True).clamp_min(1)
            mean = (x * real).sum(1, keepdim=True) / count
            variance = ((x - mean).square() * real).sum(1, keepdim=True) / count
            return mean.detach(), (variance + _EPS).sqrt().detach(), None
        real, wide = real.double(), x.detach().double()
        first = real.argmax(1)[..., None].expand(-1, -1, x.shape[2])
        shift = wide.gather(1, first).squeeze(1)
        if before is None:
            zeros = torch.zeros_like(shift)
            before = RunningMoments(zeros[:, 0], shift, zeros, zeros)
        # A row that has read nothing yet takes its first real value as the shift.
        shift = torch.where(before.number[:, None] > 0, before.shift, shift)
        gap = (wide - shift[:, None]) * real
        count = before.number[:, None, None] + real.cumsum(1)
        total = before.total[:, None] + gap.cumsum(1)
        squares = before.squares[:, None] + gap.square().cumsum(1)
        safe = count.clamp_min(1)
        mean = total / safe
        std = (squares / safe - mean.square()).clamp_min(0).add(_EPS).sqrt()
        last = RunningMoments(count[:, -1, 0], shift, total[:, -1], squares[:, -1])
        return (mean + shift[:, None]).to(x), std.to(x), RunningMoments(*(t.clone() for t in last))
