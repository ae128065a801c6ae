"""The verb ``draw``."""

from __future__ import annotations

import struct

import pytest

from manyheads.choose.block_map import DrawOptions, block_map_of
from manyheads.cli import main


@pytest.mark.parametrize(
    "what", ["sla", "routing", "local", "landmark", "causal", "window", "prefix", "documents"]
)
def test_every_kind_is_drawn(what, tmp_path, capsys) -> None:
    out = tmp_path / "folder" / "map.png"
    flags = ["--length", "150", "--block", "16", "--cell", "3", "--out", str(out)]
    assert main(["draw", what, *flags]) == 0
    shown = capsys.readouterr().out
    assert "150 tokens in blocks of 16" in shown
    assert "written: " in shown
    assert [len(line) for line in shown.splitlines()[:10]] == [10] * 10
    assert struct.unpack(">II", out.read_bytes()[16:24]) == (30, 30)


def test_shares_of_masks() -> None:
    found = block_map_of(DrawOptions(what="documents", length=256, block=64, documents=4))
    assert found[0, 0].tolist() == [[0 if i == j else -1 for j in range(4)] for i in range(4)]
    found = block_map_of(DrawOptions(what="sla", length=256, block=16, topk=0.25))
    assert ((found == 1).sum(-1) == 4).all()
    found = block_map_of(DrawOptions(what="landmark", length=256, block=16, topk=0.25))[0, 0]
    assert (found == 1).sum(-1).tolist() == [0, 1, 2, 3] + [4] * 12
    assert (found.diagonal() == 0).all()
    assert (found.triu(1)[found.triu(1) != 0] == -1).all()
    found = block_map_of(DrawOptions(what="local", length=256, block=64, window=64))
    assert found[0, 0].tolist() == [[0, -1, -1, -1], [1, 0, -1, -1], [-1, 1, 0, -1], [-1, -1, 1, 0]]
    found = block_map_of(DrawOptions(what="routing", length=1024, block=16, window=32))
    assert ((found >= 0).sum(-1) <= 4).all()


def test_wrong_options(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    for flags, words in (
        (["--out", str(tmp_path / "file" / "map.png")], "cannot be written"),
        (["--cell", "0"], "cell 0"),
        (["--block", "0"], "block 0"),
    ):
        assert main(["draw", "causal", "--length", "64", *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["draw", "causal", "--length", "64", "--out", "none"]) == 0
    assert "written" not in capsys.readouterr().out
