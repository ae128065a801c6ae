"""The verb ``shrink``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from manyheads.compress.files import check_empty, save_model
from manyheads.compress.procedure import Plan, get_procedure, list_procedures
from manyheads.errors import require_extra
from manyheads.shrink.options import ShrinkOptions, read_budget, read_steps

__all__ = ["run"]


def run(options: ShrinkOptions) -> int:
    """Shrink a model, print what was won and lost, and write the folder if one is given.

    Returns:
        0; 1 where no setting meets the budget (the nearest is shown); 130 after Ctrl-C (a search
        goes on from what it measured).

    Raises:
        ValueError: what cannot be done, before any work is lost.
    """
    if options.list:
        for name in list_procedures():
            print(f"{name:<14} {(get_procedure(name).__doc__ or '').strip().splitlines()[0]}")
        return 0
    if not options.model:
        raise ValueError("name the model: a folder, a name of ours or of timm, or builtin:minilm")
    for module in ("rich", "matplotlib"):
        require_extra(module, "choose", "manyheads shrink")
    has_plan = bool(options.plan) and Path(str(options.plan)).is_file()
    if has_plan:
        _check_plan(options)
    elif options.plan and options.then:
        raise ValueError("a plan is of one method: leave out --then, or --plan")
    else:
        read_steps(options)
    read_budget(options.budget)
    if options.out:
        check_empty(Path(options.out))
    from manyheads.choose.machine import set_threads
    from manyheads.choose.run import default_threads
    from manyheads.choose.verb import progress_bar
    from manyheads.shrink.run import prepare, search, shrink

    _quiet_transformers()
    try:
        with set_threads(options.threads or default_threads()), progress_bar() as show:
            job = prepare(options)
            do = search if options.budget and not has_plan else shrink
            model, plans, report = do(job, tell=show)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        if options.budget and options.out:
            print(
                f"what was measured is in {options.out}.search.json; the same command goes on",
                file=sys.stderr,
            )
        return 130
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report.table())
        print(f"\n{report.answer()}")
        for note in report.notes:
            print(f"note: {note}")
    if model is None:
        return 1
    if options.plan and not has_plan:
        plans[0].save(options.plan)
        print(f"written: {options.plan}", file=sys.stderr)
    if options.out:

        def write_more(folder: Path) -> None:
            report.write(folder / "report")
            for number, plan in enumerate(plans, 1):
                plan.save(folder / "report" / f"plan-{number}.json")

        save_model(model, options.out, companions=job.opened.folder, write_more=write_more)
        search_file = Path(f"{options.out}.search.json")
        search_file.unlink(missing_ok=True)
        if not options.json:
            print(f"\nwritten: {options.out} (report/report.html)\n{report.loads}")
    return 0


def _check_plan(options: ShrinkOptions) -> None:
    """Raise ``ValueError`` where a plan that is there contradicts the other options."""
    method = Plan.load(str(options.plan)).method
    if options.method not in ("", method):
        raise ValueError(f"{options.plan!r} is a plan of {method}, not of {options.method}")
    if options.then or options.budget:
        raise ValueError(f"{options.plan!r} is applied as it is: leave out --then and --budget")


def _quiet_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is not None:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
