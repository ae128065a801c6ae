"""Official names both ways: every rule, ties, and errors that say what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.layers.keymap import (
    KeyMap,
    OfficialWeights,
    constant,
    convert,
    merge,
    read_weights,
    rename,
    split,
    tied,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.k = nn.Linear(4, 4, bias=False)
        self.v = nn.Linear(4, 4, bias=False)
        self.conv = nn.Parameter(torch.randn(3, 5))


class Example(OfficialWeights):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def key_map(self) -> KeyMap:
        return KeyMap(
            rename("embed.weight", "wte.weight"),
            tied("embed.weight", "lm_head.weight"),
            constant("version", torch.tensor([3.0])),
            merge("layers.{}.qkv.weight", [f"h.{{}}.{n}.weight" for n in "qkv"]),
            merge("layers.{}.qkv.bias", [f"h.{{}}.{n}.bias" for n in "qkv"]),
            split(["layers.{}.k.weight", "layers.{}.v.weight"], "h.{}.kv"),
            convert("layers.{}.conv", "h.{}.conv", lambda t: t.mT, lambda t: t.mT),
        )


def test_round_trip() -> None:
    one, two = Example(), Example()
    official = one.to_official()
    assert set(official) == {
        "wte.weight", "lm_head.weight", "version",
        *(f"h.{i}.{n}.{k}" for i in range(2) for n in "qkv" for k in ("weight", "bias")),
        *(f"h.{i}.{n}" for i in range(2) for n in ("kv", "conv")),
    }  # fmt: skip
    assert official["h.1.conv"].shape == (5, 3)
    assert official["h.0.kv"].shape == (8, 4)
    two.load_official(official)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[key]), key
    assert two.head.weight is two.embed.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_survive_loading(device) -> None:
    with torch.device(device):
        model = Example()
    model.load_official(Example().to_official())
    assert model.head.weight is model.embed.weight
    assert not model.embed.weight.is_meta


def test_problems_are_all_named() -> None:
    official = Example().to_official()
    broken = dict(official)
    broken["h.0.q.weigth"] = broken.pop("h.0.q.weight")
    broken["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing 'h\.0\.q\.weight'") as error:
        Example().load_official(broken)
    assert "unexpected 'extra'" in str(error.value)
    assert "did you mean" in str(error.value)
    with pytest.raises(ValueError, match=r"shape \(8, 4\), this variant needs \(7, 4\)"):
        Example().load_official(
            official | {"wte.weight": torch.zeros(8, 4), "lm_head.weight": torch.zeros(8, 4)}
        )
    with pytest.raises(ValueError, match="two tensors"):
        Example().load_official(official | {"lm_head.weight": torch.zeros(7, 4)})
    with pytest.raises(ValueError, match="missing 'version'"):
        Example().load_official({k: v for k, v in official.items() if k != "version"})
    third = official | {k.replace("h.0", "h.2"): v for k, v in official.items() if "h.0" in k}
    with pytest.raises(ValueError, match=r"unexpected 'h\.2"):
        Example().load_official(third)


def test_files(tmp_path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3)}
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert torch.equal(read_weights(tmp_path / name)["a"], tensors["a"])
    with pytest.raises(ValueError, match="no weights at"):
        read_weights(tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "list.pth")


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_hostile_file_is_not_executed(tmp_path, capsys) -> None:
    torch.save({"a": Payload()}, tmp_path / "w.pth")
    with pytest.raises(Exception, match=r"[Uu]nsupported|weights_only|Weights only"):
        read_weights(tmp_path / "w.pth")
    assert "executed" not in capsys.readouterr().out
