"""Generated tasks: pure, and right by an independent reading of each rule."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.data.synthetic import (
    TASKS,
    CopyConfig,
    ListOpsConfig,
    PositionConfig,
    RecallConfig,
    RunningConfig,
    SelectiveCopyConfig,
    TaskBatches,
    evaluate_listops,
    get_task,
    listops_ids,
    listops_text,
)

SMALL = {
    "recall": RecallConfig(vocab_size=64, length=63, pairs=7),
    "copy": CopyConfig(vocab_size=11, symbols=13, min_symbols=1),
    "selective_copy": SelectiveCopyConfig(length=63, symbols=5),
    "listops": ListOpsConfig(max_depth=5, max_args=4, min_length=5, max_length=63),
    "etp": PositionConfig(words=50, length=33),
    "pi": PositionConfig(words=50, length=33),
    "running_mean": RunningConfig(length=33, min_length=5, channels=3),
    "running_max": RunningConfig(length=33, min_length=5, channels=3),
}
SEEDS = st.integers(0, 2**40)


def digest() -> str:
    h = hashlib.sha256()
    for name, task in sorted(TASKS.items()):
        batch = task.batch(SMALL[name], seed=3, indices=range(5), fold="train")
        for tensor in batch:
            h.update(tensor.numpy().tobytes())
    return h.hexdigest()


def test_the_small_configs_cover_the_registry() -> None:
    assert set(SMALL) == set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        config = task.config()
        assert task.config.from_dict(config.to_dict()) == config
        assert config.longest > 0
    with pytest.raises(ValueError, match="did you mean 'recall'"):
        get_task("recal")
    assert get_task("copy") is TASKS["copy"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_batches_fit_their_config(name: str) -> None:
    task, config = TASKS[name], SMALL[name]
    inputs, targets, mask = batch = task.batch(config, seed=1, indices=range(40))
    assert inputs.shape[:2] == mask.shape
    assert mask.shape[1] <= config.longest
    assert mask.dtype == torch.bool
    assert mask.any(1).all()
    assert (mask.long().diff(dim=1) <= 0).all(), "padding stands on the right"
    if task.kind == "values":
        assert inputs.dtype == targets.dtype == torch.float32
        assert targets.shape == (*mask.shape, config.num_outputs)
        return
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.min() >= 0
    assert inputs.max() < config.num_tokens
    assert (inputs[~mask] == config.pad_id).all()
    scored = targets[targets != -100]
    assert len(scored) >= len(inputs)
    assert scored.min() >= 0
    assert scored.max() < config.num_outputs
    if task.kind == "tokens":
        assert targets.shape == mask.shape
        assert (targets[~mask] == -100).all()
        with pytest.raises(ValueError, match="at tokens already"):
            batch.at_last_token()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_sample_depends_on_its_number_alone(name: str) -> None:
    task, config = TASKS[name], SMALL[name]
    many = task.batch(config, seed=9, indices=range(20))
    few = task.batch(config, seed=9, indices=[13])
    length = int(few.mask.sum())
    assert torch.equal(few.inputs[0], many.inputs[13, :length])
    other = task.batch(config, seed=10, indices=[13])
    assert other.inputs.shape != few.inputs.shape or not torch.equal(other.inputs, few.inputs)


def test_another_process_draws_the_same() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); from data.test_synthetic import digest; "
    code += "print(digest())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
        cwd=__file__.rpartition("/tests/")[0],
    )
    assert run.stdout.strip() == digest()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_folds_are_disjoint_and_share_out_all(name: str) -> None:
    task, config = TASKS[name], SMALL[name]
    if name == "listops":
        config = ListOpsConfig(max_depth=2, max_args=2, min_length=4, max_length=4)  # 400 in all
    drawn = {}
    for fold in ("train", "held_out"):
        samples = [task.sample(config, seed=len(fold), index=i, fold=fold) for i in range(300)]
        drawn[fold] = {x.tobytes() for x, _ in samples}
    assert not drawn["train"] & drawn["held_out"]
    if name == "listops":
        assert len(drawn["train"]) > 3 * len(drawn["held_out"]) > 0
    everything = [task.sample(config, seed=5, index=i, fold="all")[0].tobytes() for i in range(300)]
    train = [task.sample(config, seed=5, index=i, fold="train")[0].tobytes() for i in range(300)]
    # What already lies in the fold stays the sample of its number.
    assert 0.75 < np.mean([a == t for a, t in zip(everything, train, strict=True)]) < 0.97


def test_empty_folds_and_wrong_arguments() -> None:
    tiny = CopyConfig(vocab_size=4, symbols=1)
    # The only sequence of this config lies in the larger fold.
    TASKS["copy"].batch(tiny, seed=0, indices=[0], fold="train")
    with pytest.raises(ValueError, match="fold 'held_out' of task 'copy' is empty"):
        TASKS["copy"].batch(tiny, seed=0, indices=[0], fold="held_out")
    with pytest.raises(ValueError, match="none of all, train, held_out"):
        TASKS["copy"].batch(tiny, seed=0, indices=[0], fold="test")
    with pytest.raises(ValueError, match="indices are empty"):
        TASKS["copy"].batch(tiny, seed=0, indices=[])
    with pytest.raises(ValueError, match="takes a CopyConfig, got RecallConfig"):
        TASKS["copy"].batch(RecallConfig(), seed=0, indices=[0])


def test_endless_batches_resume_and_share_out() -> None:
    task, config = TASKS["recall"], SMALL["recall"]
    straight = TaskBatches(task, config, batch_size=4, seed=2)
    expected = [next(straight) for _ in range(6)]
    half = TaskBatches(task, config, batch_size=4, seed=2)
    for _ in range(3):
        next(half)
    resumed = TaskBatches(task, config, batch_size=4, seed=0)
    resumed.load_state_dict(half.state_dict())
    for want in expected[3:]:
        assert torch.equal(next(resumed).inputs, want.inputs)
    parts = [
        TaskBatches(task, config, batch_size=2, seed=2, rank=r, world_size=2).batch(5).inputs
        for r in range(2)
    ]
    assert torch.equal(torch.cat(parts), expected[5].inputs)
    default = TaskBatches(task, batch_size=1).batch(0)
    assert default.inputs.shape == (1, RecallConfig().length)


@st.composite
def recall_configs(draw: st.DrawFn) -> RecallConfig:
    pairs = draw(st.integers(1, 9))
    return RecallConfig(
        pairs=pairs,
        length=draw(st.integers(4 * pairs, 80)),
        vocab_size=draw(st.integers(2 * pairs + 2, 90)),
        power=draw(st.sampled_from([0.01, 0.5, 1.0])),
        filler=draw(st.sampled_from(["random", "zero"])),
    )


@given(recall_configs(), SEEDS)
def test_every_recall_query_has_one_right_answer(config: RecallConfig, seed: int) -> None:
    inputs, targets, mask = TASKS["recall"].batch(config, seed=seed, indices=[0])
    row, answers = inputs[0].tolist(), targets[0].tolist()
    half, context = config.vocab_size // 2, 2 * config.pairs
    keys, values = row[0:context:2], row[1:context:2]
    assert len(set(keys)) == len(set(values)) == config.pairs
    assert all(1 <= k < half for k in keys)
    assert all(half <= v < config.vocab_size for v in values)
    stored = dict(zip(keys, values, strict=True))
    asked = [n for n in range(config.length) if answers[n] != -100]
    assert sorted(row[n] for n in asked) == sorted(keys), "each key is asked for once"
    assert all(answers[n] == stored[row[n]] for n in asked)
    assert all(n >= context and (n - context) % 2 == 0 for n in asked)
    # No key stands after the pairs but as a query.
    assert [n for n in range(context, config.length) if row[n] in stored] == asked
    assert mask.all()


def test_segments_of_recall_bind_the_keys_anew() -> None:
    config = RecallConfig(vocab_size=16, length=24, pairs=4, segments=3)
    inputs, targets, mask = TASKS["recall"].batch(config, seed=0, indices=range(20))
    assert inputs.shape == targets.shape == mask.shape == (20, 72)
    assert config.longest == 72
    again = 0
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        bound: dict[int, int] = {}
        for start in range(0, 72, 24):
            pairs = dict(
                zip(row[start : start + 8 : 2], row[start + 1 : start + 8 : 2], strict=True)
            )
            again += sum(k in bound and bound[k] != v for k, v in pairs.items())
            bound |= pairs
            asked = [n for n in range(start, start + 24) if answers[n] != -100]
            assert sorted(row[n] for n in asked) == sorted(pairs)
            assert all(answers[n] == pairs[row[n]] for n in asked)
    assert again > 20, "keys get other values later on"


def test_recall_queries_are_close_by_a_power_law() -> None:
    def gaps(power: float) -> np.ndarray:
        config = RecallConfig(vocab_size=64, length=64, pairs=1, power=power)
        targets = TASKS["recall"].batch(config, seed=0, indices=range(3000)).targets
        return ((targets != -100).int().argmax(1).numpy() - 2) // 2

    slots = np.arange(1, 32)
    for power in (0.01, 1.0):
        weights = slots ** (power - 1)
        expected = 3000 * weights / weights.sum()
        observed = np.bincount(gaps(power), minlength=31)
        chi2 = ((observed - expected) ** 2 / expected).sum()
        assert chi2 < 59.7, power  # 30 degrees of freedom, one in a thousand


def test_recall_fillers_miss_only_the_keys() -> None:
    config = RecallConfig(vocab_size=20, length=40, pairs=2)
    inputs = TASKS["recall"].batch(config, seed=0, indices=range(400)).inputs
    free = inputs[:, 4:]
    assert set(free.flatten().tolist()) == set(range(20))
    zero = config.replace(filler="zero")
    batch = TASKS["recall"].batch(zero, seed=0, indices=range(4))
    assert (batch.inputs[:, 4:][batch.targets[:, 4:] == -100] == 0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pairs": 17, "length": 64}, "use 1 to 16 pairs"),
        ({"pairs": 0}, "0 pairs"),
        ({"pairs": 8, "vocab_size": 17}, "use vocab_size 18 or more"),
        ({"filler": "noise"}, "none of random, zero"),
        ({"segments": 0}, "segments 0 must be at least 1"),
    ],
)
def test_recall_configs_that_do_not_fit(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallConfig(**kwargs)


@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), SEEDS)
def test_copying_says_the_same_again(a: int, b: int, forcing: bool, seed: int) -> None:
    config = CopyConfig(
        vocab_size=9, symbols=max(a, b), min_symbols=min(a, b), teacher_forcing=forcing
    )
    inputs, targets, mask = TASKS["copy"].batch(config, seed=seed, indices=range(3))
    for row, answer, real in zip(inputs, targets, mask, strict=True):
        row, answer = row[real].tolist(), answer[real].tolist()
        count = row.index(1)
        assert min(a, b) <= count <= max(a, b)
        symbols = row[:count]
        assert all(3 <= s < 9 for s in symbols)
        assert answer == [-100] * count + symbols
        rest = symbols[:-1] if forcing else [2] * (count - 1)
        assert row[count + 1 :] == rest


@given(st.integers(1, 12), st.integers(0, 30), SEEDS)
def test_selective_copying_keeps_the_order(symbols: int, noise: int, seed: int) -> None:
    config = SelectiveCopyConfig(vocab_size=5, length=symbols + noise, symbols=symbols)
    inputs, targets, _ = TASKS["selective_copy"].batch(config, seed=seed, indices=[0])
    row = inputs[0].tolist()
    said = [t for t in row[: config.length] if t != 0]
    assert len(said) == symbols
    assert row[config.length :] == [1] * symbols
    assert targets[0].tolist() == [-100] * config.length + said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CopyConfig(vocab_size=3), "leaves no symbols: use 4"),
        (lambda: CopyConfig(symbols=3, min_symbols=4), "symbols from 4 to 3"),
        (lambda: SelectiveCopyConfig(vocab_size=2), "use 3 or more"),
        (lambda: SelectiveCopyConfig(length=3, symbols=4), "4 symbols in length 3"),
        (lambda: PositionConfig(words=20), "leaves none"),
        (lambda: PositionConfig(words=50, length=61), "need 2 to 60"),
        (lambda: RunningConfig(length=3, min_length=4), "length from 4 to 3"),
        (lambda: ListOpsConfig(min_length=9, max_length=8), "length from 9 to 8"),
        (lambda: ListOpsConfig(max_depth=2, max_args=3, min_length=6), "no expression of depth 2"),
        (lambda: ListOpsConfig(min_length=2, max_length=3), "no expression of depth"),
        (lambda: ListOpsConfig(max_args=1), "2 arguments or more"),
    ],
)
def test_configs_that_do_not_fit(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def read_tree(words: list[str]) -> int:
    """Evaluate by descent, with the median from the standard library."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    arguments = []
    while words[0] != "]":
        arguments.append(read_tree(words))
    words.pop(0)
    return {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda v: int(statistics.median(v)),
        "[SM": lambda v: sum(v) % 10,
    }[word](arguments)


def depth_and_arguments(words: list[str]) -> tuple[int, int]:
    if words.pop(0).isdigit():
        return 1, 0
    depth = count = most = 0
    while words[0] != "]":
        below, widest = depth_and_arguments(words)
        depth, most, count = max(depth, below), max(most, widest), count + 1
    words.pop(0)
    assert count >= 2
    return depth + 1, max(most, count)


@given(st.integers(3, 6), st.integers(3, 6), st.integers(4, 12), st.integers(1, 40), SEEDS)
def test_listops_samples_follow_the_rules(
    depth: int, args: int, least: int, more: int, seed: int
) -> None:
    config = ListOpsConfig(
        max_depth=depth, max_args=args, min_length=least, max_length=least + more
    )
    inputs, targets, mask = TASKS["listops"].batch(config, seed=seed, indices=range(2))
    for row, target, real in zip(inputs, targets, mask, strict=True):
        words = listops_text(row).split()
        assert len(words) == int(real.sum())
        assert least <= len(words) <= least + more
        deepest, widest = depth_and_arguments(list(words))
        assert deepest <= depth
        assert widest <= args
        assert read_tree(list(words)) == int(target) == evaluate_listops(row)
        assert listops_ids(" ".join(words)) == row[real].tolist()


EXPRESSIONS = st.recursive(
    st.integers(0, 9).map(str),
    lambda inner: st.tuples(
        st.sampled_from(["[MIN", "[MAX", "[MED", "[SM"]), st.lists(inner, min_size=1, max_size=5)
    ).map(lambda t: " ".join([t[0], *t[1], "]"])),
    max_leaves=60,
)


@given(EXPRESSIONS)
def test_the_evaluator_on_any_expression(text: str) -> None:
    assert evaluate_listops(listops_ids(text)) == read_tree(text.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MED 1 2 4 9 ]", 3),
        ("[MED 1 2 ]", 1),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
    ],
)
def test_known_values(text: str, value: int) -> None:
    assert evaluate_listops(torch.tensor(listops_ids(text))) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1", "[MAX ]", "]", "[MAX 1 ] ]"])
def test_expressions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"closes no operator|one closed expression"):
        evaluate_listops(listops_ids(text))


def test_listops_words_and_bounds() -> None:
    with pytest.raises(ValueError, match=r"'\[FIRST' is no ListOps token"):
        listops_ids("[FIRST 1 2 ]")
    hopeless = ListOpsConfig(max_depth=3, max_args=10, min_length=100, max_length=110)
    with pytest.raises(ValueError, match="no ListOps expression with length 100 to 110"):
        TASKS["listops"].batch(hopeless, seed=0, indices=[0])


def test_listops_at_the_arena_size() -> None:
    inputs, targets, mask = TASKS["listops"].batch(ListOpsConfig(), seed=0, indices=range(150))
    lengths = mask.sum(1)
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert len(targets.unique()) == 10
    operators = torch.stack([(inputs == i).sum() for i in (10, 11, 12, 13)])
    assert operators.max() < 1.1 * operators.min(), "each operator as likely"
    assert torch.equal(operators.sum(), (inputs == 14).sum())


def test_a_lone_digit_where_it_is_allowed() -> None:
    config = ListOpsConfig(max_depth=3, max_args=3, min_length=1, max_length=20)
    mask = TASKS["listops"].batch(config, seed=0, indices=range(800)).mask
    assert 0.69 < (mask.sum(1) == 1).float().mean() < 0.81  # three in four roots are digits


def test_the_label_stands_at_the_last_token() -> None:
    batch = TASKS["listops"].batch(SMALL["listops"], seed=0, indices=range(9))
    inputs, targets, mask = batch.at_last_token()
    assert targets.shape == inputs.shape
    assert ((targets != -100).sum(1) == 1).all()
    at = (targets != -100).int().argmax(1)
    rows = torch.arange(9)
    assert (inputs[rows, at] == 14).all(), "the closing bracket"
    assert torch.equal(at, mask.sum(1) - 1)
    assert torch.equal(targets[rows, at], batch.targets)


@given(st.integers(21, 200), st.data(), SEEDS)
def test_even_tokens_and_positions(words: int, data: st.DataObject, seed: int) -> None:
    length = data.draw(st.integers(2, words + 10))
    config = PositionConfig(words=words, length=length)
    inputs, targets, _ = TASKS["etp"].batch(config, seed=seed, indices=[0])
    row, answer = inputs[0].tolist(), targets[0].tolist()
    assert all(11 <= t < words - 9 for t in row)
    assert answer[: length // 2] == [row[i] for i in range(1, length, 2)]
    assert answer[length // 2 :] == [words - 2] * (length - length // 2)
    positions = TASKS["pi"].batch(config, seed=seed, indices=[0])
    assert positions.targets[0].tolist() == [-100, *range(2, length + 1)]
    assert torch.equal(positions.inputs, inputs)


def test_published_sizes_of_the_position_tasks() -> None:
    assert PositionConfig().num_tokens == 1011
    assert PositionConfig().pad_id == 1
    assert PositionConfig().longest == 128


@given(st.integers(1, 40), SEEDS)
def test_running_statistics(length: int, seed: int) -> None:
    config = RunningConfig(length=length, channels=2)
    for name, whole in (("running_mean", torch.mean), ("running_max", torch.amax)):
        inputs, targets, _ = TASKS[name].batch(config, seed=seed, indices=[0])
        for n in range(length):
            expected = whole(inputs[0, : n + 1].double(), dim=0)
            assert torch.allclose(targets[0, n].double(), expected, atol=1e-6)
