"""The harness's own command line, in which ``--model manyheads`` is known."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import manyheads.bridges.lm_eval  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
