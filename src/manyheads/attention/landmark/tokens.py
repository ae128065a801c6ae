"""Landmark tokens in data: put them in, take them out, wherever a stream is cut.

B batch, N tokens, M tokens with landmarks, L = freq + 1 tokens a block with its landmark.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["insert_landmarks", "landmark_jumps", "landmark_places", "strip_landmarks"]


def landmark_places(
    length: int, freq: int, *, offset: int = 0, device: torch.device | None = None
) -> Tensor:
    """Return (M,), True at the landmarks that ``length`` tokens get.

    Args:
        length: N, tokens without landmarks.
        freq: tokens between landmarks.
        offset: tokens of the stream before these, landmarks not counted.

    Raises:
        ValueError: freq is below 1, or offset or length negative.
    """
    if freq < 1:
        raise ValueError(f"freq {freq} must be at least 1: tokens between two landmarks")
    if offset < 0 or length < 0:
        raise ValueError(f"offset {offset} and length {length} must not be negative")
    first = offset % freq
    total = length + (first + length) // freq
    return (torch.arange(total, device=device) + first) % (freq + 1) == freq


def landmark_jumps(is_landmark: Tensor, most: int) -> Tensor:
    """Draw gaps in the positions of a sequence: one behind each landmark, in training alone.

    A model that has met them bears the gaps between fetched blocks. torch's global generator.

    Args:
        is_landmark: (B, N) bool, at any places.
        most: a gap has 0 to ``most`` - 1 places.

    Returns:
        (B, N) integers that never fall along N: to be added to the positions.

    Raises:
        ValueError: ``most`` is below 1.

    Example:
        >>> landmark_jumps(torch.tensor([[False, True, False, True, False]]), 1)
        tensor([[0, 0, 0, 0, 0]])
    """
    if most < 1:
        raise ValueError(f"most {most} must be at least 1: gaps have 0 to most - 1 places")
    landmark = is_landmark.long()
    gaps = torch.randint_like(landmark, most) * landmark
    return gaps.cumsum(1) - gaps


def insert_landmarks(ids: Tensor, freq: int, landmark_id: int, *, offset: int = 0) -> Tensor:
    """Put a landmark behind every ``freq`` tokens of a stream.

    Pieces of a stream, each with its ``offset``, give the same tokens as the whole: a landmark
    follows directly the token that fills its block.

    Args:
        ids: (B, N) tokens without landmarks.
        freq: tokens between landmarks.
        landmark_id: the landmark.
        offset: tokens of the stream before these, landmarks not counted.

    Returns:
        (B, M).

    Raises:
        ValueError: ``ids`` holds the landmark already, or freq is below 1.

    Example:
        >>> insert_landmarks(torch.arange(5)[None], 2, 9).tolist()
        [[0, 1, 9, 2, 3, 9, 4]]
    """
    if bool((ids == landmark_id).any()):
        raise ValueError(
            f"ids hold the landmark {landmark_id}: remove it, only insert_landmarks may place it"
        )
    marks = landmark_places(ids.shape[1], freq, offset=offset, device=ids.device)
    out = ids.new_full((ids.shape[0], len(marks)), landmark_id)
    out[:, ~marks] = ids
    return out


def strip_landmarks(x: Tensor, freq: int, *, offset: int = 0, dim: int = 1) -> Tensor:
    """Take out what stands at landmarks: the inverse of :func:`insert_landmarks`.

    Args:
        x: tokens, hidden states or logits whose axis ``dim`` is the length M.
        freq, offset: as they were inserted with.

    Raises:
        ValueError: freq is below 1.
    """
    if freq < 1:
        raise ValueError(f"freq {freq} must be at least 1: tokens between two landmarks")
    places = torch.arange(x.shape[dim], device=x.device) + offset % freq
    return x.index_select(dim, (places % (freq + 1) != freq).nonzero()[:, 0])
