"""Gluon, Triton's language in which a kernel chooses its layouts, or Triton itself in its interpreter on a CPU.

The interpreter knows no Gluon, whose words differ from Triton's in their layouts only; there they are dropped.
"""

import builtins
import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret


class _WithoutLayouts:
    """The words of Gluon that the kernels use, by Triton's."""

    static_range = builtins.range

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def SliceLayout(self, dim: Any, parent: Any) -> Any:
        """Return no layout."""

    def arange(self, start: Any, end: Any, layout: Any) -> Any:
        """Return the numbers from start to end."""
        return tl.arange(start, end)

    def full(self, shape: Any, value: Any, dtype: Any, layout: Any) -> Any:
        """Return a tensor filled with a value."""
        return tl.full(shape, value, dtype)

    def convert_layout(self, x: Any, layout: Any, assert_trivial: Any = False) -> Any:
        """Return x."""
        return x


def _range(*limits: Any) -> builtins.range:
    """Return the range between numbers; the interpreter keeps them in arrays, which NumPy 2.4 takes for no index."""
    return builtins.range(*[limit if isinstance(limit, int) else int(limit.handle.data.item()) for limit in limits])


gl: Any
range: Any
_jit: Any
if INTERPRETED:
    gl, range, _jit = _WithoutLayouts(), _range, triton.jit
else:
    from triton.experimental import gluon

    gl, range, _jit = gluon.language, builtins.range, gluon.jit


def _plain(compile: Any) -> Callable[..., Any]:
    """Return a decorator that compiles the source of a function, without wrappers such as those that check types."""

    def decorate(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: decorate(function, **options)
        return compile(inspect.unwrap(function), **options)

    return decorate


jit = _plain(_jit)  # for Gluon
triton_jit = _plain(triton.jit)  # for Triton, where no layouts are chosen
