"""The procedure: smaller, learnt, stopped and gone on, saved and loaded as a stock BERT."""

from __future__ import annotations

import pytest
import torch

from manyheads.compress import Plan, get_procedure
from manyheads.compress.minilm import MiniLM, needs_assistant
from manyheads.models.language.bert import BertConfig, BertEncoder


def loss_of(plan, model, student) -> float:
    """Held-out text is the same here: only that it fell is asked."""
    from manyheads.compress.minilm import QKV, minilm_loss
    from manyheads.compress.minilm.training import padded

    rows = list(plan.tensors["tokens"].long().split(plan.tensors["lengths"].tolist()))
    tokens, mask = padded(rows)
    with torch.no_grad():
        (_, *theirs), (_, *own) = (m(tokens, mask=mask, output="qkv") for m in (model, student))
        return float(minilm_loss(QKV(*theirs), QKV(*own), mask=mask))


@pytest.mark.parametrize("start", ["teacher", "random"])
def test_the_loss_falls_and_weights_are_gone(teacher, text, start) -> None:
    options = {"start": start, "embedding_weight": 0.0, "batch_size": 10, "learning_rate": 5e-3}
    plan = MiniLM(steps=80, **options).plan(teacher, text)
    before = MiniLM(steps=0, **options).plan(teacher, text).apply(teacher).eval()
    student = plan.apply(teacher).eval()
    assert student.num_parameters() < 0.5 * teacher.num_parameters()
    assert student.num_parameters() == plan.measured["student_parameters"]
    assert loss_of(plan, teacher, student) < 0.6 * loss_of(plan, teacher, before)


def test_embeddings_come_nearer(teacher, text) -> None:
    options = {"batch_size": 10, "learning_rate": 3e-3, "hidden_size": 24}
    short, long = (
        MiniLM(steps=steps, **options).plan(teacher, text).apply(teacher).eval()
        for steps in (0, 60)
    )
    tokens, mask = text[0]["input_ids"], text[0]["attention_mask"].bool()
    with torch.no_grad():
        cosines = []
        for model in (teacher, short, long):
            means = (model(tokens, mask=mask).features * mask[..., None]).sum(1)
            unit = torch.nn.functional.normalize(means, dim=-1)
            cosines.append(unit @ unit.mT)
    far, near = ((c - cosines[0]).square().mean() for c in cosines[1:])
    assert near < 0.5 * far


def test_the_model_itself_is_left_alone(teacher, text) -> None:
    kept = {k: t.clone() for k, t in teacher.state_dict().items()}
    MiniLM(steps=2).plan(teacher, text).apply(teacher)
    assert all(torch.equal(t, kept[k]) for k, t in teacher.state_dict().items())
    assert not teacher.training


def test_stopped_and_gone_on_is_equal_to_the_bit(teacher, text, tmp_path, monkeypatch) -> None:
    from manyheads.compress.minilm import training

    monkeypatch.setattr(training, "_SAVE_EVERY", 4)
    whole = MiniLM(steps=10, batch_size=7).plan(teacher, text).apply(teacher)
    plan = MiniLM(steps=10, batch_size=7, checkpoint=str(tmp_path / "c")).plan(teacher, text)
    usual, calls = training.epoch_indices, []

    def stopping(step, *args, **options):
        calls.append(step)
        if step == 6:
            raise KeyboardInterrupt
        return usual(step, *args, **options)

    monkeypatch.setattr(training, "epoch_indices", stopping)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(teacher)
    monkeypatch.setattr(training, "epoch_indices", usual)
    gone_on = plan.apply(teacher)
    assert calls[-1] == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(gone_on.state_dict()[name], tensor), name
    other = MiniLM(steps=12, batch_size=7, checkpoint=str(tmp_path / "c")).plan(teacher, text)
    with pytest.raises(ValueError, match="is of another distillation"):
        other.apply(teacher)


def test_time_ends_it(teacher, text) -> None:
    plan = MiniLM(steps=10**6, minutes=1e-3).plan(teacher, text)
    assert plan.apply(teacher).config.num_hidden_layers == 2


def test_a_plan_is_data(teacher, text, tmp_path) -> None:
    plan = MiniLM(steps=3, batch_size=5, relations="v2").plan(teacher, text)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    a, b = plan.apply(teacher), again.apply(teacher)
    assert all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())
    fresh = BertEncoder(teacher.config)
    get_procedure("minilm").restructure(plan.structure, fresh).load_state_dict(a.state_dict())


def test_a_bert_of_transformers(teacher, text, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from manyheads.compress.files import load_model, save_model

    config = transformers.BertConfig.from_dict(teacher.config.to_official())
    model = transformers.BertModel(config).eval()
    model.load_state_dict(teacher.to_official())
    plan = MiniLM(steps=3, batch_size=5).plan(model, text)
    student = plan.apply(model)
    assert isinstance(student, transformers.BertModel)
    ours = MiniLM(steps=3, batch_size=5).plan(teacher, text).apply(teacher)
    for name, tensor in ours.to_official().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, msg=name)
    save_model(student, tmp_path / "out")
    stock = transformers.AutoModel.from_pretrained(tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert "manyheads" not in (tmp_path / "out" / "config.json").read_text()
    for loaded in (stock, again):
        for name, tensor in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_what_it_refuses(teacher, text) -> None:
    with pytest.raises(ValueError, match="calibration holds no sentence"):
        MiniLM().plan(teacher, [])
    with pytest.raises(ValueError, match="no input_ids"):
        MiniLM().plan(teacher, [{"pixel_values": torch.zeros(1)}])
    with pytest.raises(ValueError, match="the teacher has 3 heads and the student 2"):
        MiniLM(num_heads=2, start="random").plan(teacher, text)
    with pytest.raises(ValueError, match="hidden_size 39 exceeds the teacher's 36"):
        MiniLM(hidden_size=39, start="random").plan(teacher, text)
    with pytest.raises(ValueError, match="is no BertModel"):
        MiniLM().plan(torch.nn.Linear(2, 2), text)
    with pytest.raises(ValueError, match="nothing to learn"):
        MiniLM(relation_weight=0.0, embedding_weight=0.0)
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        MiniLM(num_layer=3)


def test_other_heads_go_by_relation_heads(teacher, text) -> None:
    options = {"num_heads": 2, "relation_heads": 6, "start": "random", "embedding_weight": 0.0}
    student = MiniLM(steps=2, **options).plan(teacher, text).apply(teacher)
    assert student.config.num_attention_heads == 2


def test_when_an_assistant_is_advised() -> None:
    base = BertConfig()
    assert needs_assistant(base, base.replace(num_hidden_layers=6, hidden_size=384))
    assert not needs_assistant(base, base.replace(num_hidden_layers=6))
    assert not needs_assistant(base, base.replace(hidden_size=384))
