"""Our linear layers inside models of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from manyheads.bridges.transformers import quicken
from manyheads.layers import few_rows


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=96, intermediate_size=200, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("batch", [1, 5])
def test_the_same_tokens_come_out(batch, monkeypatch) -> None:
    model, prompt = llama(), torch.randint(99, (batch, 9))
    wanted = model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert quicken(model) == 2 * 7 + 1
    rows: list[int] = []
    real = few_rows._kernel()
    assert real is not None

    def kernel(*arguments: object) -> None:
        rows.append(int(str(arguments[4])))
        real(*arguments)

    monkeypatch.setattr(few_rows, "_kernel", lambda: kernel)
    assert torch.equal(model.generate(prompt, max_new_tokens=9, do_sample=False), wanted)
    # Eight tokens after the prompt's, and the prompt's last row in the head.
    assert rows.count(batch) == 8 * (2 * 7 + 1) + 1


def test_saving_and_tied_weights_stay(tmp_path) -> None:
    model = llama()
    keys = list(model.state_dict())
    quicken(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert list(again.state_dict()) == keys
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    assert quicken(gpt) == 1  # the others are Conv1D, which are left alone
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
