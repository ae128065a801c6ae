"""Calls of the int8 kernels over shapes that are apt to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.attention import MambaConfig, MambaMixer
from manyheads.compress.quamba import Int8Mamba, calibrate_block
from manyheads.native import int8_encode, int8_float_linear, int8_linear

# rows, inputs, outputs
SHAPES = ((1, 1, 1), (4, 64, 16), (7, 77, 33), (1, 129, 5), (9, 48, 100), (3, 2100, 17),
          (5, 63, 16), (0, 8, 8), (33, 70, 21))  # fmt: skip
# width, expand, states, taps, groups, bias of the projections, rotated
BLOCKS = ((8, 2, 8, 4, 1, False, True), (12, 2, 5, 3, 1, True, True),
          (10, 1, 16, 4, 2, False, False), (24, 2, 20, 1, 3, True, True),
          (7, 2, 3, 2, 1, False, False))  # fmt: skip


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Codes over the whole range, both ends included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def block(shape: tuple[int, int, int, int, int, bool, bool]) -> tuple[MambaMixer, Int8Mamba]:
    """A float block with no weight at rest, and its int8 form."""
    width, expand, states, taps, groups, biased, rotated = shape
    made = MambaMixer(
        MambaConfig(
            embed_dim=width, expand=expand, state_dim=states, conv_size=taps, num_heads=groups,
            proj_bias=biased, conv_bias=not biased,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    seen = [torch.randn(1, 40, width, generator=generator)]
    scales = calibrate_block(made, seen, percentile=0.9999, hadamard=rotated)
    return made, Int8Mamba.from_float(made, scales, hadamard=rotated)


def calls() -> Iterator[None]:
    """Do one call after another."""
    for rows, inputs, outputs in SHAPES:
        x, w = codes(rows, inputs + 3)[:, 3:], codes(outputs, inputs, seed=1)
        for scale in (torch.tensor([1e-3]), torch.rand(outputs)):
            int8_linear(x, w, scale, bias=torch.randn(outputs), codes=True)
            int8_linear(x, w, scale, row_scale=torch.rand(rows))
            int8_float_linear(torch.randn(rows, inputs), w, scale)
            yield
        int8_encode(torch.randn(rows, inputs), torch.tensor([0.02]))
        int8_float_linear(
            torch.randn(rows, inputs), w, torch.tensor([1e-3]), input_scale=torch.tensor(0.02),
            input_zero=torch.tensor(-90, dtype=torch.int32),
        )  # fmt: skip
        yield
    for shape in BLOCKS:
        _, small = block(shape)
        x = torch.randn(3, 9, shape[0])
        mask = torch.arange(9) < torch.tensor([[9], [0], [4]])
        state = small.init_state(3)
        for cut in (x[:, :1], x[:, 1:]):
            _, state = small.update(cut, state)
        small.update(x, state, mask=mask)
        small.step(x[:, 0], state)
        yield
    # Long enough that threads share the work.
    _, small = block((24, 2, 16, 4, 1, False, True))
    small(torch.randn(2, 700, 24))
    yield
