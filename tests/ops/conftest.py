"""Kernels that are compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.offline import Driver, tool


@pytest.fixture(params=[80, 90, 100])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that are launched are compiled for this architecture and kept here instead of run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if not tool("cuobjdump").exists():
        pytest.skip("this build of Triton brings no cuobjdump")
    kept: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kept.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver(request.param))
    return kept
