"""Our models under the evaluation harness: scores against forward passes, and its evaluator."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from manyheads.bridges.lm_eval import ManyheadsLM
from manyheads.bridges.transformers import ManyheadsForCausalLM
from manyheads.data import ByteTokenizer
from manyheads.models import load_model
from manyheads.models.language.landmark import LandmarkGPT, LandmarkGPTConfig
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train.generate import continuation

PAIRS = [
    ("The cat", " sat"), ("", "alone"), ("One two three four five six", " seven"), ("é", "à l'été"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(1)
    model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="gla,softmax,aaren"))
    with torch.no_grad():
        model.embed.weight.mul_(20)
    model.save(tmp_path / "run")
    ByteTokenizer().save(tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def asked(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def likelihood(model, context: bytes, text: bytes) -> tuple[float, bool]:
    ids = torch.tensor([list(context + text)])
    logits = model.eval()(ids[:, :-1])[0, len(context) - 1 :].log_softmax(-1)
    wanted = ids[0, len(context) :]
    score = logits.gather(-1, wanted[:, None]).sum()
    return float(score), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_likelihoods_are_those_of_a_forward_pass(run, batch_size, monkeypatch) -> None:
    monkeypatch.setattr("manyheads.bridges.lm_eval.model._BLOCK", 5)
    lm, model = ManyheadsLM(str(run), batch_size=batch_size), load_model(run)
    found = lm.loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    for (context, text), (score, greedy) in zip(PAIRS, found, strict=True):
        wanted = likelihood(model, (context or "\n").encode(), text.encode())
        assert score == pytest.approx(wanted[0], rel=1e-5)
        assert greedy == wanted[1]
    texts = ["a longer text than one block", "short", ""]
    rolled = lm.loglikelihood_rolling([asked(t) for t in texts])
    for text, score in zip(texts[:2], rolled, strict=False):
        assert score == pytest.approx(likelihood(model, b"\n", text.encode())[0], rel=1e-5)
    assert rolled[2] == 0


def test_a_bound_on_the_length(run) -> None:
    lm, model = ManyheadsLM(str(run), max_length=4), load_model(run)
    (found,) = lm.loglikelihood([asked("abcdefgh", "ij")], disable_tqdm=True)
    assert found[0] == pytest.approx(likelihood(model, b"fgh", b"ij")[0], rel=1e-5)
    (rolled,) = lm.loglikelihood_rolling([asked("abcdefg")])
    wanted = likelihood(model, b"\n", b"abcd")[0] + likelihood(model, b"cd", b"efg")[0]
    assert rolled == pytest.approx(wanted, rel=1e-5)


def test_answers_end_before_the_stop_text(run) -> None:
    lm = ManyheadsLM(str(run), batch_size=2)
    model, tokenizer = lm.model, lm.own
    contexts = ["The cat sat", "x", "on the mat of the"]
    free = lm.generate_until([asked(c, {"max_gen_toks": 12}) for c in contexts])
    for context, text in zip(contexts, free, strict=True):
        pieces = continuation(model, tokenizer, context, max_new_tokens=12, temperature=0)
        assert text == "".join(pieces)
    stop = free[0][3:5]
    options = {"until": ["never", stop], "max_gen_toks": 12, "temperature": 0.0}
    (ended,) = lm.generate_until([asked(contexts[0], options)])
    assert ended == free[0][: free[0].index(stop)]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 40}
    drawn = lm.generate_until([asked(c, dict(sampled)) for c in contexts])
    assert drawn == lm.generate_until([asked(c, dict(sampled)) for c in contexts])
    assert drawn != free
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until([asked("a", {"num_beams": 3})])


def test_folders_of_transformers_and_landmark_models(run, tmp_path) -> None:
    ManyheadsForCausalLM.from_folder(run).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"no tokenizer\.json: pass tokenizer=FILE"):
        ManyheadsLM(str(tmp_path / "hf"))
    requests = [asked(*p) for p in PAIRS]
    wanted = ManyheadsLM(str(run)).loglikelihood(requests, disable_tqdm=True)
    other = ManyheadsLM(str(tmp_path / "hf"), tokenizer=str(run / "tokenizer.json"))
    found = other.loglikelihood(requests, disable_tqdm=True)
    for (a, _), (b, _) in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    marked = LandmarkGPT(
        LandmarkGPTConfig(
            vocab_size=300, landmark_id=299, embed_dim=32, num_layers=1, num_heads=2, freq=5
        )
    )
    marked.save(tmp_path / "landmark")
    lm = ManyheadsLM(str(tmp_path / "landmark"), tokenizer=str(run / "tokenizer.json"))
    assert len(lm.loglikelihood(requests, disable_tqdm=True)) == len(PAIRS)
    with pytest.raises(ValueError, match="is no folder"):
        ManyheadsLM(str(tmp_path / "nothing"))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
metric_list:
  - metric: {metric}
metadata:
  version: 1
"""
LINES = [
    {"context": "The cat sat on the", "answer": "mat", "choices": ["mat", "sun"], "gold": 0},
    {"context": "Two and two make", "answer": "four", "choices": ["five", "four"], "gold": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf_datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    kinds = (
        ("mine_choice", "multiple_choice", "gold\ndoc_to_choice: choices", "acc"),
        ("mine_rolling", "loglikelihood_rolling", '"{{context}} {{answer}}"', "bits_per_byte"),
        ("mine_answer", "generate_until", "answer", "exact_match"),
    )
    for name, kind, target, metric in kinds:
        text = TASK.format(name=name, data=data, kind=kind, target=target, metric=metric)
        if kind == "loglikelihood_rolling":
            text = text.replace('doc_to_text: "{{context}}"', 'doc_to_text: ""')
        if kind == "generate_until":
            text += "generation_kwargs:\n  until:\n    - '\\n'\n  max_gen_toks: 5\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_the_evaluator_runs_offline(run, tasks) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model="manyheads",
        model_args=f"run={run}",
        batch_size=2,
        tasks=["mine_choice", "mine_rolling", "mine_answer"],
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    model = load_model(run)
    right = []
    for line in LINES:
        scores = [likelihood(model, line["context"].encode(), b" " + c.encode())[0] for c in
                  line["choices"]]  # fmt: skip
        right.append(scores.index(max(scores)) == line["gold"])
    assert found["mine_choice"]["acc,none"] == sum(right) / 2
    texts = [f"{line['context']} {line['answer']}".encode() for line in LINES]
    nats = -sum(likelihood(model, b"\n", t)[0] for t in texts)
    bits = nats / torch.log(torch.tensor(2.0)).item() / sum(len(t) for t in texts)
    assert found["mine_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["mine_answer"]["exact_match,none"] == 0


def test_the_command_line_knows_the_model(run, tasks, tmp_path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "manyheads.bridges.lm_eval", "--model", "manyheads",
            "--model_args", f"run={run}", "--tasks", "mine_rolling", "--include_path", str(tasks),
            "--output_path", str(tmp_path / "out"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mine_rolling" in done.stdout
    assert "bits_per_byte" in done.stdout
