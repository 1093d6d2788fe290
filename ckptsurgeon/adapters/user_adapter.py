"""The decorator for a user's own adapter: a function from tensors to a tensor, with a second function that gives the result's shape.

It does not import torch, so that a module that only marks functions loads fast. Nothing is called or checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ckptsurgeon.arguments import checked, described
from ckptsurgeon.errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])


@checked
def adapter(shape: Callable[..., Any]) -> Callable[[F], F]:
    """Mark a function as an adapter, which rules and plans then name as `module:function` or `path/to/file.py:function`.

    The function is called as `function(tensors, **arguments)` with the CPU tensors that a rule names, in order, and the rule's literal
    arguments; it gives one new tensor. It must not write into `tensors`.

    Args:
        shape: `shape(shapes, **arguments)` returns the shape of the function's result for tensors of `shapes`, a tuple of tuples. It is
            called when a plan is made, where no tensor is at hand.

    Returns:
        The decorator, which gives the function itself back.

    Raises:
        ArgumentError: `shape`, or what is marked, is no function.
        TargetError: not here, but where a rule names the function and it gives no shape, or no tensor.

    >>> @adapter(shape=lambda shapes, **arguments: shapes[0][::-1])
    ... def flip(tensors, **arguments):
    ...     return tensors[0].T
    >>> flip.shape([(2, 3)])
    (3, 2)
    """

    def mark(function: F) -> F:
        if not callable(function):
            raise ArgumentError(f"marks a function, and {described(function)} was given", key="adapter", hint="write it above a function")
        function.shape = shape  # type: ignore[attr-defined]
        return function

    return mark
