"""What tests in Triton's interpreter share; for a process with TRITON_INTERPRET, see `offline.interpret`.

The interpreter computes float32 for tf32, cuts off where a GPU rounds to bfloat16, and runs programs one by one: it
proves indices, masks and formulas, not rounding and not races.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

prepared: set[str] = set()  # modules of kernels that a launch has prepared
usual_call = InterpretedFunction.__call__


def call(function: InterpretedFunction, *args: object, **kwargs: object) -> object:
    """As Triton calls a function from a kernel: it prepares the function's module for the interpreter in every call, on
    top of what the calls before did. Here once, which is several times as fast."""
    if function.fn.__module__ in prepared:
        return function.rewrite()(*args, **kwargs)
    prepared.add(function.fn.__module__)
    return usual_call(function, *args, **kwargs)


@contextmanager
def serving_the_cpu(cpu: ModuleType, functions: dict[str, Callable[..., Any]], kernels: ModuleType) -> Iterator[None]:
    """These functions run the kernels in place of those of the same names in the module `cpu`."""
    prepared.add(kernels.__name__)  # a launch prepares the module of its kernel
    # On a thread's short stack: on pytest's deep one Python 3.11 maps and unmaps a piece of it in every other call.
    thread = ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=[False])
    with pytest.MonkeyPatch.context() as patch, thread:
        for name, function in functions.items():
            patch.setattr(cpu, name, lambda *args, function=function: thread.submit(function, *args).result())
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
