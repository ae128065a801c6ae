"""Softmax-free attention: definition, inverse, layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compare import assert_close, relative_error
from manyheads.attention.grid import GridShape, build_mixer, get_mixer
from manyheads.attention.soft import (
    SoftAttention,
    gaussian_attention,
    gaussian_kernel,
    newton_inverse,
    newton_inverse_normalised,
    soft,
    soft_reference,
)
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import largest_tensor_numel, track_memory
from manyheads.models import create_model


def _inputs(length: int = 63, landmarks: int = 7, dim: int = 20, batch: int = 3) -> list[Tensor]:
    sizes = (length, dim), (landmarks, dim), (length, 9)
    tensors = [torch.randn(batch, 2, *s, dtype=torch.float64) for s in sizes]
    return [t.requires_grad_() for t in tensors]


def _gram(size: int = 7, spread: float = 1.0, batch: int = 3) -> Tensor:
    points = spread * torch.randn(batch, size, 5, dtype=torch.float64)
    return gaussian_kernel(points, points)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_fast_is_the_definition(normalise, batch) -> None:
    inputs = _inputs(batch=batch)
    found = []
    for fn in (soft, soft_reference):
        out = fn(*inputs, scale=0.7, normalise=normalise)
        grads = torch.autograd.grad(out.sin().sum(), inputs)
        found.append((out, *grads))
    for name, a, b in zip(("out", "query", "landmarks", "value"), *found, strict=True):
        assert_close(a, b, 1e-9, name)


def test_all_tokens_as_landmarks_give_the_kernel_itself() -> None:
    query = 3 * torch.randn(2, 2, 31, 8, dtype=torch.float64)
    value = torch.randn(2, 2, 31, 8, dtype=torch.float64)
    # The shift of 0.01 is a part of the plain inverse, so the normalised one's iteration is used.
    gram = gaussian_kernel(query, query)
    inverse = newton_inverse_normalised(gram, iterations=40)
    assert_close(gram @ inverse @ gram @ value, gaussian_attention(query, value, scale=1.0), 1e-8)


def test_more_landmarks_come_closer_to_the_kernel() -> None:
    rows = torch.linspace(0, 2, 24, dtype=torch.float64)
    y, x = torch.meshgrid(rows, rows, indexing="ij")
    maps = torch.stack((y.sin(), x.cos(), (x + y).sin(), (x * y).cos()), -1)[None, None]
    query, value = maps.flatten(2, 3), torch.randn(1, 1, 576, 6, dtype=torch.float64)
    exact, errors = gaussian_attention(query, value, scale=1.0), []
    for step in (24, 12, 6):
        chosen = maps[:, :, step // 2 :: step, step // 2 :: step].flatten(2, 3)
        errors.append(relative_error(soft(query, chosen, value), exact))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_residual_is_squared_each_step() -> None:
    gram = _gram(spread=2.0)
    shifted = gram + 0.01 * torch.eye(7, dtype=torch.float64)
    before = None
    for steps in range(12):
        residual = torch.eye(7, dtype=torch.float64) - shifted @ newton_inverse(
            gram, iterations=steps
        )
        if before is not None:
            assert_close(residual + 1, before @ before + 1, 1e-12)
        before = residual


def test_the_gradient_is_that_of_an_inverse_where_it_converged() -> None:
    gram = _gram(spread=3.0).requires_grad_()
    weights = torch.randn(3, 7, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad((newton_inverse(gram) * weights).sum(), gram)
    exact = torch.linalg.inv(gram + 0.01 * torch.eye(7, dtype=torch.float64))
    (theirs,) = torch.autograd.grad((exact * weights).sum(), gram)
    assert_close(ours, theirs, 1e-8)


def test_memory_does_not_grow_with_the_steps() -> None:
    peaks = []
    for steps in (5, 50):
        gram = _gram(size=40).requires_grad_()
        with track_memory() as memory:
            newton_inverse(gram, iterations=steps).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


def test_twenty_steps_leave_ill_conditioned_matrices_where_they_are() -> None:
    gram = _gram(size=20, spread=0.3)
    shifted = gram + 0.01 * torch.eye(20, dtype=torch.float64)
    far = relative_error(newton_inverse(gram), torch.linalg.inv(shifted))
    near = relative_error(newton_inverse(gram, iterations=40), torch.linalg.inv(shifted))
    assert near < 1e-6 < 0.01 < far


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_the_step_is_halved_as_by_a_loop(spread) -> None:
    gram = _gram(size=6, spread=spread)
    step, eye = 2 / gram.sum(-1).amax().square(), torch.eye(6, dtype=torch.float64)
    for _ in range(10):
        if (eye - step * gram @ gram).abs().sum(-2).amax() <= 1.01:
            break
        step = step / 2
    assert_close(
        newton_inverse_normalised(gram, iterations=0, shared_step=True), step * gram, 1e-12
    )


def test_a_sample_depends_on_its_batch_with_a_shared_step_alone() -> None:
    gram = torch.cat((_gram(size=9, spread=0.5, batch=1), _gram(size=9, spread=3.0, batch=1)))
    own = newton_inverse_normalised(gram)
    assert_close(newton_inverse_normalised(gram[1:]), own[1:], 1e-12)
    shared = newton_inverse_normalised(gram, iterations=4, shared_step=True)
    alone = newton_inverse_normalised(gram[1:], iterations=4, shared_step=True)
    assert relative_error(shared[1:], alone) > 1e-3


@pytest.mark.parametrize("normalise", [False, True])
def test_half_precision_is_float32_inside(normalise) -> None:
    query, landmarks, value = (t.detach().bfloat16() for t in _inputs(landmarks=12))
    wide = soft(query.float(), landmarks.float(), value.float(), normalise=normalise)
    out = soft(query, landmarks, value, normalise=normalise)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), wide, 4e-3)
    with torch.autocast("cpu", torch.bfloat16):
        out = soft(query.float(), landmarks.float(), value.float(), normalise=normalise)
    assert torch.equal(out, wide)


def test_nothing_of_places_by_places_is_made() -> None:
    layer = SoftAttention(16, 2, ratio=8)
    x = torch.randn(1, 40, 48, 16, requires_grad=True)
    largest = largest_tensor_numel(lambda: layer(x).sum().backward())
    places, landmarks = 40 * 48, 5 * 6
    assert largest <= 2 * places * landmarks


def test_landmarks_stop_growing_where_asked() -> None:
    official, limited = (SoftAttention(16, 2, ratio=2, max_landmarks=limit) for limit in (None, 4))
    limited.load_state_dict(official.state_dict())
    small, large = torch.randn(1, 8, 9, 16), torch.randn(1, 20, 9, 16)
    assert torch.equal(official(small), limited(small))
    assert limited._landmarks(torch.randn(2, 8, 20, 9)).shape[1] == 16
    assert relative_error(limited(large), official(large)) > 1e-3


def test_a_mixer_of_any_backbone() -> None:
    model = create_model(
        "poolformer_s12",
        depths=(1, 1, 1, 1),
        embed_dims=(16, 24, 32, 64),
        mixers=("pool", "pool", "soft", "attention"),
        num_heads=(2, 2, 4, 2),
        image_size=160,
        num_classes=7,
    )
    assert model(torch.randn(1, 3, 160, 192)).shape == (1, 7)
    mixer = build_mixer("soft", 24, num_heads=3, grid=(14, 21))
    assert mixer.attention.ratio == 2
    x = torch.randn(2, 24, 28, 35)
    shape = GridShape(batch=2, dim=24, height=28, width=35, num_heads=3)
    mixer = build_mixer("soft", 24, num_heads=3, grid=(28, 35))
    with torch.no_grad():
        counted = count_flops(mixer, x).total
    assert counted == pytest.approx(get_mixer("soft").flops(shape), rel=0.02)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads 3"):
        SoftAttention(16, 3)
    with pytest.raises(ValueError, match="columns, fewer than ratio 8"):
        SoftAttention(16, 2)(torch.randn(1, 9, 7, 16))
    with pytest.raises(ValueError, match="odd"):
        SoftAttention(16, 2, conv_size=4)
    with pytest.raises(ValueError, match="no option 'ratios'"):
        build_mixer("soft", 16, num_heads=2, ratios=4)
    with pytest.raises(ValueError, match="square"):
        newton_inverse(torch.zeros(2, 3, 4))
    query, landmarks, value = _inputs()
    with pytest.raises(ValueError, match="values belong to them"):
        soft(query, landmarks, value[:, :, 1:])
    with pytest.raises(ValueError, match="length 0"):
        soft(query, landmarks[:, :, :0], value)
