"""Matrix PCA, refinement, drift and budgets, against what they are defined by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.compress.masa import (
    allocate_ranks,
    kl_drift,
    low_rank_refinement,
    matrix_pca,
    runs_of_layers,
)


@pytest.mark.parametrize("shape", [(8, 6, 5), (3, 7, 2), (9, 2, 3)])
def test_pca_is_the_truncated_svd(shape) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    flat = matrices.flatten(1)
    u, values, vh = torch.linalg.svd(flat, full_matrices=False)
    for atoms in range(1, min(flat.shape) + 1):
        found = matrix_pca(matrices, atoms)
        best = (u[:, :atoms] * values[:atoms]) @ vh[:atoms]
        assert_close(found.reconstruction().flatten(1) + 1, best + 1, 1e-10)
        torch.testing.assert_close(found.singular_values, values)
        torch.testing.assert_close(found.error, values[atoms:].square().sum(), atol=1e-12, rtol=0)
        gram = found.atoms.flatten(1) @ found.atoms.flatten(1).mT
        torch.testing.assert_close(gram, torch.eye(atoms, dtype=torch.float64))


def test_pca_of_matrices_that_are_one_and_the_same() -> None:
    one = torch.randn(5, 4)
    found = matrix_pca(torch.stack([one, 2 * one, -one]), 2)
    assert float(found.error) < 1e-10
    assert (found.singular_values[1:] < 1e-7).all()
    assert found.atoms.isfinite().all()


def test_pca_leaves_no_more_than_averages() -> None:
    matrices = torch.randn(6, 7, 5) + torch.randn(7, 5)
    halves = torch.cat([h.mean(0, keepdim=True).expand(3, 7, 5) for h in matrices.split(3)])
    averaged = (matrices - halves).square().sum()
    assert float(matrix_pca(matrices, 2).error) < float(averaged)


def test_refinement_is_the_best_of_its_rank_on_the_inputs() -> None:
    x = torch.randn(50, 7, dtype=torch.float64) * torch.logspace(0, 2, 7, dtype=torch.float64)
    residual = torch.randn(7, 5, dtype=torch.float64)
    moments = x.mT @ x / 50
    found = low_rank_refinement(residual, moments, rank=2)
    plain = low_rank_refinement(residual, None, rank=2)

    def error(f) -> float:
        return float((x @ (residual - f.down @ f.up)).square().sum()) / 50

    s = torch.linalg.svdvals(x @ residual)
    assert error(found) == pytest.approx(float(s[2:].square().sum()) / 50)
    assert error(found) < error(plain)
    whole = low_rank_refinement(residual, moments, rank=5)
    assert_close(whole.down @ whole.up, residual, 1e-10)
    none = low_rank_refinement(residual, moments, rank=0)
    assert (none.down @ none.up).abs().sum() == 0


def test_refinement_with_fewer_inputs_than_channels() -> None:
    x = torch.randn(3, 7)
    found = low_rank_refinement(torch.randn(7, 5), x.mT @ x / 3, rank=2)
    assert found.down.isfinite().all()
    zero = low_rank_refinement(torch.randn(7, 5), torch.zeros(7, 7), rank=2)
    assert zero.up.isfinite().all()


def test_drift_is_kl_and_runs_cut_where_it_is_largest() -> None:
    means, weight = torch.randn(5, 8), torch.randn(11, 8)
    log_probs, drift = kl_drift(means, weight)
    p = (means.double() @ weight.double().mT).softmax(-1)
    for i in range(4):
        kl = (p[i] * (p[i] / p[i + 1]).log()).sum()
        assert float(drift[i]) == pytest.approx(float(kl))
    assert_close(log_probs.exp(), p, 1e-12)
    assert runs_of_layers([0.5, 0.1, 0.7, 0.2], 3) == [[0], [1, 2], [3, 4]]
    assert runs_of_layers([], 1) == [[0]]
    assert runs_of_layers([1.0, 1.0], 2) == [[0], [1, 2]]
    with pytest.raises(ValueError, match="4 groups of 3 layers"):
        runs_of_layers([0.1, 0.2], 4)


@settings(max_examples=40, deadline=None)
@given(budget=st.integers(0, 60), seed=st.integers(0, 10))
def test_ranks_keep_to_the_budget_and_greedy_takes_the_most(budget, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(n, generator=generator).sort(descending=True).values for n in (3, 5, 2)]
    costs = [4, 4, 4]
    kept = {}
    for name in ("greedy", "uniform"):
        ranks = allocate_ranks(values, costs, budget, allocation=name)
        assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
        assert all(r <= len(v) for r, v in zip(ranks, values, strict=True))
        kept[name] = sum(float(v[:r].square().sum()) for v, r in zip(values, ranks, strict=True))
    count = min(budget // 4, 10)
    best = torch.cat(values).sort(descending=True).values[:count].square().sum()
    assert kept["greedy"] == pytest.approx(float(best), abs=1e-6)
    assert kept["uniform"] <= kept["greedy"] + 1e-9


def test_what_does_not_fit_is_said() -> None:
    for match, call in (
        ("2 axes", lambda: matrix_pca(torch.randn(3, 4), 1)),
        ("4 atoms", lambda: matrix_pca(torch.randn(3, 5, 4), 4)),
        ("rank 6", lambda: low_rank_refinement(torch.randn(7, 5), None, rank=6)),
        ("moments", lambda: low_rank_refinement(torch.randn(7, 5), torch.eye(5), rank=1)),
        ("finite", lambda: low_rank_refinement(torch.randn(2, 5), torch.eye(2) / 0, rank=1)),
        ("budget -1", lambda: allocate_ranks([], [], -1)),
        ("'greedy'", lambda: allocate_ranks([], [], 1, allocation="greed")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
