"""Kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter prepares its language anew at each call of a device function; once per kernel is enough."""
    try:
        from triton.runtime import interpreter
    except ImportError:  # no Triton here: nothing will run in it
        yield
        return
    call = interpreter.InterpretedFunction.__call__

    def quick(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("leaf_kernels.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = quick
    options = interpreter.interpreter_builder.options
    sanitize = options.sanitize_overflow
    object.__setattr__(options, "sanitize_overflow", False)  # doubles the time of every addition
    yield
    interpreter.InterpretedFunction.__call__ = call
    object.__setattr__(options, "sanitize_overflow", sanitize)
