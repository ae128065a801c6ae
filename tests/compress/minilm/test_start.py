"""A student that starts from its teacher: equal where nothing is cut, near where little is."""

from __future__ import annotations

import pytest
import torch

from compare import relative_error
from manyheads.compress.minilm.start import (
    collect_streams,
    start_from_teacher,
    stream_basis,
    teacher_layers,
)
from manyheads.models.language.bert import BertEncoder


def seen(text):
    return [(b["input_ids"], b["attention_mask"].bool()) for b in text]


def started(teacher, text, basis=None, **changes):
    student = BertEncoder(teacher.config.replace(**changes)).eval()
    streams = collect_streams(teacher, seen(text))
    if basis is None:
        basis = stream_basis(streams, student.config.hidden_size)
    return start_from_teacher(student, teacher, streams, basis), basis


def test_equal_where_nothing_is_cut(teacher, text) -> None:
    student, _ = started(teacher, text, torch.eye(36))
    tokens, mask = seen(text)[0]
    expected = teacher(tokens, mask=mask).features
    assert relative_error(student(tokens, mask=mask).features, expected) < 1e-4


def test_fewer_layers_are_the_teachers_own(teacher, text) -> None:
    student, _ = started(teacher, text, torch.eye(36), num_hidden_layers=2)
    tokens, mask = seen(text)[0]
    theirs = BertEncoder(teacher.config.replace(num_hidden_layers=2)).eval()
    state = theirs.state_dict()
    for name, tensor in teacher.state_dict().items():
        if name.startswith("embeddings."):
            state[name] = tensor
        for own, place in ((0, 1), (1, 3)):
            if name.startswith(f"encoder.layer.{place}."):
                state[name.replace(f"layer.{place}.", f"layer.{own}.")] = tensor
    theirs.load_state_dict(state)
    expected = theirs(tokens, mask=mask).features
    assert relative_error(student(tokens, mask=mask).features, expected) < 1e-4


def test_nearer_than_chance_where_the_width_is_cut(teacher, text) -> None:
    sizes = {"hidden_size": 27, "intermediate_size": 39, "num_hidden_layers": 4}
    student, basis = started(teacher, text, **sizes)
    tokens, mask = seen(text)[1]
    goal = (teacher(tokens, mask=mask).features @ basis)[mask]

    def apart(model: BertEncoder) -> float:
        return relative_error(model(tokens, mask=mask).features[mask], goal)

    torch.manual_seed(3)
    random = BertEncoder(student.config).eval()
    assert apart(student) < 0.75 * apart(random)


def test_the_basis_is_orthonormal_and_holds_most(teacher, text) -> None:
    streams = collect_streams(teacher, seen(text))
    assert len(streams.states) == 5
    assert all(len(s) == sum(int(m.sum()) for _, m in seen(text)) for s in streams.states)
    basis = stream_basis(streams, 18)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(18), atol=1e-5, rtol=0)
    kept = (streams.pooled @ basis).square().sum() / streams.pooled.square().sum()
    lost = streams.pooled[:, :18].square().sum() / streams.pooled.square().sum()
    assert kept > max(0.9, lost)


def test_layers_are_evenly_spaced() -> None:
    assert teacher_layers(12, 6) == (1, 3, 5, 7, 9, 11)
    assert teacher_layers(5, 2) == (1, 4)
    assert teacher_layers(3, 3) == (0, 1, 2)
    with pytest.raises(ValueError, match="must be from 1 to the teacher's 4"):
        teacher_layers(4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 2}, "num_attention_heads is 3 in the teacher and 2"),
        ({"intermediate_size": 60}, "intermediate_size 60 exceeds"),
        ({"num_hidden_layers": 5}, "layers must be from 1"),
    ],
)
def test_what_does_not_fit(teacher, text, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        started(teacher, text, torch.eye(36), **changes)
