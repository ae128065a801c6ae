"""Shared atoms: products and gradients, what is kept, what is stored, what is exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compare import assert_close
from manyheads.layers.sharing import (
    AtomDictionary,
    CoefficientNetwork,
    LowRankLinear,
    SharedLinear,
    SharingConfig,
    Slot,
    mix,
    share,
    shared_linear,
    shared_linear_reference,
    store_coefficients,
    to_dense,
)
from manyheads.train.optim import parameter_groups

SLOTS = {"query": [Slot(str(i)) for i in range(6)]}


def pairs(*outputs: int, atoms: int = 3, inputs: int = 7, dtype=torch.float64):
    return [
        (
            torch.randn(atoms, o, inputs, dtype=dtype, requires_grad=True),
            torch.randn(atoms, dtype=dtype, requires_grad=True),
        )
        for o in outputs
    ]


def stack(layers: int = 6, inputs: int = 7, outputs: int = 7) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(inputs, outputs) for _ in range(layers)))


@pytest.mark.parametrize("shape", [(63, 7), (3, 21, 7), (7,)])
@pytest.mark.parametrize("outputs", [(5,), (5, 3, 4)])
def test_product_and_gradients_are_the_definitions(shape, outputs) -> None:
    given = pairs(*outputs)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(sum(outputs), dtype=torch.float64, requires_grad=True)
    leaves = [x, bias, *(t for pair in given for t in pair)]
    results = []
    for form in (shared_linear, shared_linear_reference):
        out = form(x, given, bias)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for name, fast, slow in zip(("out", "x", "bias", "atoms", "c"), *results, strict=False):
        assert_close(fast, slow, 1e-12, name)


def test_gradients_of_gradients() -> None:
    given = pairs(2, 3, atoms=2, inputs=4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *flat):
        return shared_linear(x, list(zip(flat[::2], flat[1::2], strict=True)))

    flat = [t for pair in given for t in pair]
    assert torch.autograd.gradcheck(run, (x, *flat))
    assert torch.autograd.gradgradcheck(run, (x, *flat))


def test_backward_keeps_no_mixed_matrix() -> None:
    given = pairs(64, inputs=64)
    known = {t.data_ptr() for pair in given for t in pair}
    kept = []
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        shared_linear(x, given)
    new = [t for t in kept if t.data_ptr() not in known | {x.data_ptr()}]
    assert kept
    assert not new


def test_autocast_multiplies_in_half_and_mixes_in_single() -> None:
    given = pairs(33, inputs=20, dtype=torch.float32)
    x = torch.randn(63, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = shared_linear(x, given)
        expected = nn.functional.linear(x, mix(*given[0]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert given[0][0].grad.dtype == x.grad.dtype == torch.float32


def test_what_does_not_fit_is_said() -> None:
    atoms, coefficients = pairs(5)[0]
    for match, call in (
        ("8 channels", lambda: shared_linear(torch.randn(2, 8).double(), [(atoms, coefficients)])),
        ("one part", lambda: shared_linear(torch.randn(2, 7), [])),
        ("do not fit", lambda: mix(atoms, coefficients[:2])),
        ("2 coefficients", lambda: AtomDictionary(atoms, torch.randn(4, 2))),
        ("rank 9", lambda: LowRankLinear(8, 8, 9)),
        ("atoms is 0", lambda: SharingConfig(atoms=0)),
        ("repeat", lambda: SharingConfig(atoms=1, kind="repeet")),
        ("did you mean 'query'", lambda: SharingConfig(atoms=1, projections=("queri",))),
        ("each matrix once", lambda: SharingConfig(atoms=1, projections=("query", "query"))),
        (
            "7 atoms for 6",
            lambda: share(stack(), SLOTS, SharingConfig(atoms=7, projections=("query",))),
        ),
        ("no key", lambda: share(stack(), SLOTS, SharingConfig(atoms=2, projections=("key",)))),
        (
            "holds 3 matrices",
            lambda: share(
                stack(outputs=21),
                {"query": [Slot(str(i), 0, 3) for i in range(6)]},
                SharingConfig(atoms=2, projections=("query",)),
            ),
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_as_many_atoms_as_layers_and_the_identity_are_the_dense_model() -> None:
    model = stack()
    dense = copy.deepcopy(model)
    share(model, SLOTS, SharingConfig(atoms=6, projections=("query",)))
    with torch.no_grad():
        model.shared_atoms["query"].coefficients.copy_(torch.eye(6))
    x = torch.randn(3, 21, 7)
    assert torch.equal(model[:6](x), dense(x))


@pytest.mark.parametrize(
    ("kind", "rows"), [("repeat", [0, 1, 0, 1, 0, 1]), ("sequential", [0, 0, 0, 1, 1, 1])]
)
def test_baselines_are_fixed_choices_of_one_atom(kind, rows) -> None:
    model = share(stack(), SLOTS, SharingConfig(atoms=2, kind=kind, projections=("query",)))
    for layer, row in enumerate(rows):
        assert torch.equal(model[layer].weight, model.shared_atoms["query"].atoms[row])
    assert model.shared_atoms["query"].coefficients.argmax(1).tolist() == rows
    assert "shared_atoms.query.coefficients" not in dict(model.named_parameters())


def test_atoms_are_stored_and_counted_once() -> None:
    model = share(stack(), SLOTS, SharingConfig(atoms=2, projections=("query",)))
    assert sum(p.numel() for p in model.parameters()) == 2 * 49 + 6 * 2 + 6 * 7
    assert [k for k in model.state_dict() if "bias" not in k] == [
        "shared_atoms.query.atoms",
        "shared_atoms.query.coefficients",
    ]
    other = share(stack(), SLOTS, SharingConfig(atoms=2, projections=("query",)))
    other.load_state_dict(model.state_dict(), strict=True)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 7)
    assert torch.equal(other[:6](x), model[:6](x))
    with torch.no_grad():
        twin.shared_atoms["query"].atoms.mul_(2)
    assert not torch.equal(twin[:6](x), model[:6](x))


@pytest.mark.parametrize("coefficients", ["direct", "network"])
def test_export_is_the_training_model_to_the_bit(coefficients) -> None:
    model = share(
        stack(),
        SLOTS,
        SharingConfig(atoms=2, projections=("query",), coefficients=coefficients),
    )
    x = torch.randn(3, 21, 7)
    expected = model[:6](x)
    stored = store_coefficients(copy.deepcopy(model))
    assert not any("network" in k for k in stored.state_dict())
    assert torch.equal(stored[:6](x), expected)
    dense = to_dense(copy.deepcopy(model))
    assert torch.equal(dense(x), expected)
    assert all(isinstance(m, nn.Linear) for m in dense)
    with torch.no_grad():
        assert torch.equal(model.eval()[:6](x), expected)


def test_the_kept_matrix_follows_what_it_is_mixed_from(monkeypatch) -> None:
    model = share(stack(), SLOTS, SharingConfig(atoms=2, projections=("query",))).eval()
    layer, calls = model[0], []
    mixed = AtomDictionary.weight
    monkeypatch.setattr(AtomDictionary, "weight", lambda self, i: calls.append(i) or mixed(self, i))
    x = torch.randn(2, 7)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert calls == [0]
        model.shared_atoms["query"].coefficients[0] *= 2
        assert_close(layer(x) - layer.bias, 2 * (first - layer.bias), 1e-6)
        assert calls == [0, 0]
        model.double()
        assert layer(x.double()).dtype == torch.float64
    layer.train()
    assert layer._mixed is None
    layer.eval().keep = False
    with torch.no_grad():
        layer(x.double())
    assert layer._mixed is None


def test_corrections_are_added_to_their_part() -> None:
    first, second = (AtomDictionary(torch.randn(2, o, 7), torch.randn(1, 2)) for o in (5, 3))
    layer = SharedLinear([(first, 0), (second, 0)], ranks=(0, 2), bias=torch.randn(8))
    with torch.no_grad():
        for p in (*layer.down.values(), *layer.up.values()):
            p.normal_()
    x = torch.randn(4, 7)
    expected = (
        x @ torch.cat((first.weight(0), second.weight(0) + layer.up["1"] @ layer.down["1"])).mT
    )
    assert_close(layer(x), expected + layer.bias, 1e-6)
    assert_close(layer.eval().to_dense()(x), layer(x), 1e-6)
    layer.keep = False
    many = torch.randn(63, 7)  # added to the matrix for many tokens, applied after it for few
    with torch.no_grad():
        assert_close(layer(many)[:2], layer(many[:2]), 1e-6)


def test_mixed_matrices_start_with_the_variance_of_the_models_own() -> None:
    slots = {"query": [Slot(str(i)) for i in range(12)]}
    for options in ({}, {"coefficients": "network"}, {"kind": "low-rank"}):
        model = stack(12, 96, 96)
        usual = model[0].weight.std()
        config = SharingConfig(atoms=4, projections=("query",), **options)
        share(model, slots, config)
        spread = torch.stack([m.weight for m in model[:12]]).square().mean().sqrt()
        assert 0.6 < spread / usual < 1.6
        assert not torch.equal(model[0].weight, model[1].weight)
        if not options:
            table = model.shared_atoms["query"].coefficients.detach()
            torch.testing.assert_close(table.norm(dim=1), torch.ones(12))


def test_coefficients_do_not_decay_and_atoms_do() -> None:
    for options in ({}, {"coefficients": "network"}):
        model = share(stack(), SLOTS, SharingConfig(atoms=2, projections=("query",), **options))
        decayed, others = (g["params"] for g in parameter_groups(model, 0.1))
        assert [p.shape for p in decayed] == [(2, 7, 7)]
        assert len(others) == 6 + (1 if not options else 7)


def test_network_has_three_layers_and_different_rows() -> None:
    network = CoefficientNetwork(5, 3)
    table = torch.stack([network(i) for i in range(5)])
    assert table.shape == (5, 3)
    assert float(table.detach().square().mean()) == pytest.approx(1 / 3, rel=1e-4)
    assert sum(isinstance(m, nn.Linear) for m in network.modules()) == 3


def test_compiles_whole() -> None:
    model = share(
        stack(2), {"query": [Slot("0"), Slot("1")]}, SharingConfig(atoms=1, projections=("query",))
    )
    x = torch.randn(3, 7)
    compiled = torch.compile(lambda x: model[1](model[0](x)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model[1](model[0](x)), 1e-6)
    compiled(x).sum().backward()
    assert model.shared_atoms["query"].coefficients.grad is not None
