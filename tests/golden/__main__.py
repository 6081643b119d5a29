"""`python -m tests.golden DIR [--paper NAME]`: runs a folder of golden cases. Exit status 1 if any output fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .case import adapter, find_cases, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Run a folder of golden cases.")
    parser.add_argument("folder", type=Path, help="holds PAPER/*.json, or *.json")
    parser.add_argument("--paper", help="this paper's cases only")
    options = parser.parse_args(arguments)

    passed = failed = cases = 0
    without: dict[str, int] = {}
    for case in find_cases(options.folder):
        if options.paper not in (None, case.paper):
            continue
        module = adapter(case.paper)
        if module is None:
            without[case.paper] = without.get(case.paper, 0) + 1
            continue
        cases += 1
        print(f"{case.paper}/{case.name}")
        for verdict in run(case, module):
            print(f"  {'pass' if verdict.passed else 'FAIL'}  {verdict.output}: {verdict.detail}", flush=True)
            passed += verdict.passed
            failed += not verdict.passed
    for paper, count in without.items():
        print(f"{paper}: no adapter, {count} cases not run")
    print(f"{cases} cases, {passed} outputs pass, {failed} fail")
    nothing = cases == 0 or (options.paper is not None and bool(without))
    return 1 if failed or nothing else 0


if __name__ == "__main__":
    sys.exit(main())
