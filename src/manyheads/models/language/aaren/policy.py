"""A policy in the manner of the Decision Transformer (2106.01345), on an Aaren stack.

B batch, N time steps, S numbers an observation, A numbers (or kinds) of an action.

Tokens are (return to go, observation, action) of each time step; the action is read off the
observation's output. The paper swaps attention in that model and gives no code: a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.ragged import check_mask
from manyheads.models.language.aaren.tasks import AarenTaskConfig, AarenTaskModel
from manyheads.models.language.causal import LMState

__all__ = ["AarenPolicy", "AarenPolicyConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenPolicyConfig(AarenTaskConfig):
    """Sizes of the stack, and:

    Attributes:
        observation_dim, action_dim: S and A.
        discrete: actions are integers below A, and logits are returned.
        max_timestep: rows of the table of learned time embeddings.
        tanh: continuous actions lie in [-1, 1].
    """

    observation_dim: int
    action_dim: int
    discrete: bool = False
    max_timestep: int = 4096
    tanh: bool = True
    add_positions: bool = False


class AarenPolicy(AarenTaskModel):
    """Acts on returns to go and observations; an episode of any length costs O(1) memory.

    Example:
        >>> policy = AarenPolicy(AarenPolicyConfig(observation_dim=11, action_dim=3))
        >>> state = policy.init_state(1)
        >>> returns, observation, time = torch.ones(1), torch.randn(1, 11), torch.tensor([0])
        >>> action, state = policy.act(returns, observation, time, state)
        >>> state = policy.record(action, time, state)
    """

    config_class: ClassVar[type[Config]] = AarenPolicyConfig
    config: AarenPolicyConfig

    def __init__(self, config: AarenPolicyConfig) -> None:
        super().__init__(config)
        c = config
        self.embed_return = nn.Linear(1, c.embed_dim)
        self.embed_observation = nn.Linear(c.observation_dim, c.embed_dim)
        self.embed_action: nn.Module
        if c.discrete:
            self.embed_action = nn.Embedding(c.action_dim, c.embed_dim)
        else:
            self.embed_action = nn.Linear(c.action_dim, c.embed_dim)
        self.embed_time = nn.Embedding(c.max_timestep, c.embed_dim)
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head = nn.Linear(c.embed_dim, c.action_dim)

    def forward(
        self,
        returns: Tensor,
        observations: Tensor,
        actions: Tensor,
        times: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the action of every time step, given what came before it: (B, N, A).

        Args:
            returns: (B, N), the sum of rewards that is still to come.
            observations: (B, N, S).
            actions: (B, N, A), or (B, N) integers; the one of a step is not seen by that step.
            times: (B, N) integers below ``max_timestep``.
            mask: (B, N), True = a real time step.
        """
        mask = check_mask(mask, *times.shape)
        time = self.embed_time(times)
        parts = (
            self.embed_return(returns[..., None]),
            self.embed_observation(observations),
            self.embed_action(actions),
        )
        tokens = torch.stack([p + time for p in parts], 2).flatten(1, 2)  # (B, 3N, C)
        wide = None if mask is None else mask.repeat_interleave(3, 1)
        return self._head(self._encode(self.norm(tokens), wide)[:, 1::3])

    def init_state(self, batch_size: int) -> LMState:
        """Return the state before the first time step."""
        return self._first_state(batch_size)

    def act(
        self, returns: Tensor, observations: Tensor, times: Tensor, state: LMState
    ) -> tuple[Tensor, LMState]:
        """Return the action (B, A) of this time step and the next state.

        Args:
            returns: (B,).
            observations: (B, S).
            times: (B,) integers.
            state: what :meth:`init_state` or :meth:`record` returned.
        """
        time = self.embed_time(times)
        _, state = self._encode_step(self.norm(self.embed_return(returns[:, None]) + time), state)
        token = self.norm(self.embed_observation(observations) + time)
        hidden, state = self._encode_step(token, state)
        return self._head(hidden), state

    def record(self, actions: Tensor, times: Tensor, state: LMState) -> LMState:
        """Read the action that was taken, (B, A) or (B,) integers; return the next state."""
        token = self.norm(self.embed_action(actions) + self.embed_time(times))
        return self._encode_step(token, state)[1]

    def _head(self, hidden: Tensor) -> Tensor:
        out = self.head(hidden)
        return out.tanh() if self.config.tanh and not self.config.discrete else out
