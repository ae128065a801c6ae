"""MixerEncoder: every mechanism classifies padded, packed and single sequences alike."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig
from manyheads.registry import list_mechanisms

LENGTHS = (17, 40, 29)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("name", list_mechanisms())
def test_padded_packed_and_alone_agree(name, pool) -> None:
    config = MixerEncoderConfig(
        num_classes=4, in_channels=6, embed_dim=60, num_heads=3, mixers=f"{name}*2", pool=pool
    )
    model = MixerEncoder(config).eval().double()
    rows = [torch.randn(1, n, 6).double() for n in LENGTHS]
    alone = torch.cat([model(r) for r in rows])
    padded, mask = torch.randn(3, 40, 6).double(), torch.zeros(3, 40, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, (23, 0, 5), strict=True)):
        padded[i, start : start + row.shape[1]] = row[0]
        mask[i, start : start + row.shape[1]] = True
    assert_close(model(padded, mask=mask), alone, 1e-8)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    assert_close(model(torch.cat(rows, 1), cu_seqlens=borders), alone, 1e-8)


@pytest.mark.parametrize("name", list_mechanisms())
def test_first_token_sees_the_last(name) -> None:
    """Causal mechanisms read every other layer from the end."""
    config = MixerEncoderConfig(
        num_classes=4, vocab_size=9, embed_dim=60, num_heads=3, mixers=f"{name}*2", pool="first"
    )
    model = MixerEncoder(config).eval().double()
    tokens = torch.randint(9, (2, 30))
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 9
    assert (model(tokens) - model(other)).abs().max() > 1e-9


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        MixerEncoderConfig(num_classes=2)
    with pytest.raises(ValueError, match="pool"):
        MixerEncoderConfig(num_classes=2, vocab_size=3, pool="max")


def test_directions_are_in_turn_or_as_given() -> None:
    config = MixerEncoderConfig(num_classes=4, vocab_size=9, mixers="gla*3,softmax")
    assert config.directions == (False, True, False, False)
    given = config.replace(backwards=(True, False, False, True))
    assert given.directions == (True, False, False, False), "softmax sees both ways"
    assert MixerEncoderConfig.from_dict(given.to_dict()) == given
    with pytest.raises(ValueError, match="backwards names 1 layers of 4"):
        config.replace(backwards=(True,))
