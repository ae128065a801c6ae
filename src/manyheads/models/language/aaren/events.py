"""Event forecasting: when the next event comes and of which kind it is.

B batch, N events, K marks, M mixture components.

The paper swaps attention in a Transformer Hawkes process and gives no head. Ours is a
reconstruction: log-normal mixtures for the time to the next event (1909.12127), whose likelihood
and mean are closed forms, and a softmax over marks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.config import Config
from manyheads.layers.absolute import sinusoidal
from manyheads.layers.ragged import check_mask
from manyheads.models.language.aaren.tasks import AarenTaskConfig, AarenTaskModel
from manyheads.models.language.causal import LMState

__all__ = ["AarenEventModel", "AarenEventsConfig", "EventState", "NextEvent"]

_TINY = 1e-8  # shortest interval whose logarithm is taken


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenEventsConfig(AarenTaskConfig):
    """Sizes of the stack, and ``num_marks`` K and ``num_components`` M.

    ``add_positions`` is off: times carry the order.
    """

    num_marks: int
    num_components: int = 16
    add_positions: bool = False


class NextEvent(NamedTuple):
    """What is expected after each event, in units of the given times.

    ``log_weights``, ``locations``, ``log_scales`` (..., M) of the log-normal mixture of the time to
    the next event, and ``mark_logits`` (..., K).
    """

    log_weights: Tensor
    locations: Tensor
    log_scales: Tensor
    mark_logits: Tensor

    @property
    def interval(self) -> Tensor:
        """Return the mean time to the next event, (...)."""
        exponent = self.locations + (2 * self.log_scales).exp() / 2
        return (self.log_weights + exponent).logsumexp(-1).exp()

    @property
    def mark(self) -> Tensor:
        """Return the likeliest mark, (...)."""
        return self.mark_logits.argmax(-1)

    def interval_log_prob(self, interval: Tensor) -> Tensor:
        """Return the log density of intervals (...), each at least 1e-8."""
        log = interval.clamp_min(_TINY).log()[..., None]
        z = (log - self.locations) * (-self.log_scales).exp()
        density = -z.square() / 2 - self.log_scales - log - math.log(2 * math.pi) / 2
        return (self.log_weights + density).logsumexp(-1)

    def mark_log_prob(self, mark: Tensor) -> Tensor:
        """Return the log probability of marks (...)."""
        return self.mark_logits.log_softmax(-1).gather(-1, mark[..., None]).squeeze(-1)


class EventState(NamedTuple):
    """``model``, and the time of the last event (B), -inf before the first."""

    model: LMState
    time: Tensor


class AarenEventModel(AarenTaskModel):
    """Marked temporal point process on an Aaren stack; reads an endless stream in O(1) memory.

    Example:
        >>> model = AarenEventModel(AarenEventsConfig(num_marks=5))
        >>> times, marks = torch.rand(2, 30).cumsum(1), torch.randint(5, (2, 30))
        >>> model(times, marks).mark_logits.shape
        torch.Size([2, 30, 5])
    """

    config_class: ClassVar[type[Config]] = AarenEventsConfig
    config: AarenEventsConfig

    def __init__(self, config: AarenEventsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.num_marks, config.embed_dim)
        self.interval_proj = nn.Linear(1, config.embed_dim)
        self.time_head = nn.Linear(config.embed_dim, 3 * config.num_components)
        self.mark_head = nn.Linear(config.embed_dim, config.num_marks)

    def forward(self, times: Tensor, marks: Tensor, *, mask: Tensor | None = None) -> NextEvent:
        """Return what is expected after each event.

        Args:
            times: (B, N), not falling among the real events of a row.
            marks: (B, N) integers below K.
            mask: (B, N), True = a real event.
        """
        mask = check_mask(mask, *times.shape)
        before = times.new_full(times.shape[:1], -torch.inf)
        x, _ = self._embed(times, marks, mask, before)
        return self._head(self._encode(x, mask))

    def log_likelihood(
        self, times: Tensor, marks: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods of interval and mark of every event given those before it.

        The first event of a row is given, not scored.

        Returns:
            Two (B, N) tensors, 0 at padding and at the first event of a row.
        """
        expected = self(times, marks, mask=mask)
        index = torch.arange(times.shape[1], device=times.device).expand_as(times)
        if mask is not None:
            index = index.masked_fill(~mask, -1)
        latest = F.pad(index.cummax(1).values[:, :-1], (1, 0), value=-1)
        scored = (index >= 0) & (latest >= 0)
        source = latest.clamp_min(0)
        at = NextEvent(
            *(t.gather(1, source[..., None].expand(-1, -1, t.shape[-1])) for t in expected)
        )
        gaps = (times - times.gather(1, source)).masked_fill(~scored, 1.0)
        picked = marks.masked_fill(~scored, 0)
        when = at.interval_log_prob(gaps).masked_fill(~scored, 0)
        which = at.mark_log_prob(picked).masked_fill(~scored, 0)
        return when, which

    def loss(self, times: Tensor, marks: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the mean negative log-likelihood of a scored event, in nats."""
        when, which = self.log_likelihood(times, marks, mask=mask)
        real = torch.ones_like(marks, dtype=torch.bool) if mask is None else mask
        scored = (real.sum(1) - 1).clamp_min(0).sum()
        return -(when + which).sum() / scored.clamp_min(1)

    def init_state(self, batch_size: int) -> EventState:
        """Return the state before the first event."""
        weight = self.embed.weight
        time = torch.full((batch_size,), -torch.inf, device=weight.device, dtype=weight.dtype)
        return EventState(self._first_state(batch_size), time)

    def update(
        self, times: Tensor, marks: Tensor, state: EventState, *, mask: Tensor | None = None
    ) -> tuple[NextEvent, EventState]:
        """Read a block of events (B, N): what is expected after each, and the next state."""
        mask = check_mask(mask, *times.shape)
        x, last = self._embed(times, marks, mask, state.time)
        hidden, model = self._encode_update(x, state.model, mask)
        return self._head(hidden), EventState(model, last)

    def step(self, times: Tensor, marks: Tensor, state: EventState) -> tuple[NextEvent, EventState]:
        """Read one event a row, (B,) and (B,): what is expected next, and the next state."""
        x, last = self._embed(times[:, None], marks[:, None], None, state.time)
        hidden, model = self._encode_step(x[:, 0], state.model)
        return self._head(hidden), EventState(model, last)

    def _embed(
        self, times: Tensor, marks: Tensor, mask: Tensor | None, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return embedded events (B, N, C) and the time of the last real one (B)."""
        real = times if mask is None else times.masked_fill(~mask, -torch.inf)
        latest = torch.cat((before.to(times)[:, None], real), 1).cummax(1).values  # (B, N + 1)
        earlier = latest[:, :-1]
        gaps = (times - earlier.masked_fill(earlier == -torch.inf, 0)).clamp_min(_TINY).log()
        gaps = gaps.masked_fill(earlier == -torch.inf, 0)  # the first event has no interval
        weight = self.embed.weight
        x = self.embed(marks) + self.interval_proj(gaps[..., None].to(weight))
        return x + sinusoidal(times, self.config.embed_dim).to(x), latest[:, -1].clone()

    def _head(self, hidden: Tensor) -> NextEvent:
        weights, locations, log_scales = self.time_head(hidden).chunk(3, -1)
        return NextEvent(
            weights.log_softmax(-1), locations, log_scales.clamp(-10, 10), self.mark_head(hidden)
        )
