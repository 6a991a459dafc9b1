"""Reverse-mode differentiation: a tape of operations on arrays, which are written once, each with its derivative.

A layer is written forward only, over nodes. Without a tape its operations keep nothing. Gradients that meet at a node
are added in the reverse order of its uses, so a run gives the same bits every time. Arrays may be of NumPy or of any
module with its functions, such as CuPy: `array_module` returns it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Backward = Callable[[Array], Any]  # gradient at the result -> gradient at an input, or a tuple of those at the inputs
Operation = Callable[..., "tuple[Array, Backward | tuple[Backward, ...]]"]


def array_module(x: Array) -> Any:
    """Return the module of the array `x`: numpy, or cupy for its arrays."""
    return sys.modules[type(x).__module__.partition(".")[0]]


@dataclass(frozen=True, slots=True)
class PartOf:
    """A gradient that is zero but for the items `key`, which hold `g`; no item is named twice."""

    key: Any
    g: Array


class Node:
    """An array of a computation, its gradient once it is known, and the tape that recorded it."""

    __slots__ = ("_owned", "grad", "tape", "value")

    def __init__(self, value: Array, tape: Tape | None = None) -> None:
        self.value, self.tape = value, tape
        self.grad: Array | None = None
        self._owned = False  # whether nothing else holds the array `grad`

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The type of the array's items."""
        return self.value.dtype

    def __len__(self) -> int:
        return len(self.value)

    def __add__(self, other: Node | Array | float) -> Node:
        return _add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Node | Array | float) -> Node:
        return _subtract(self, other)

    def __rsub__(self, other: Array | float) -> Node:
        return _subtract(other, self)

    def __mul__(self, other: Node | Array | float) -> Node:
        return _multiply(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Node | Array | float) -> Node:
        return _divide(self, other)

    def __matmul__(self, other: Node | Array) -> Node:
        return _matmul(self, other)

    def __rmatmul__(self, other: Array) -> Node:
        return _matmul(other, self)

    __array_ufunc__ = None  # an array leaves its operators with a node to the node

    def __getitem__(self, key: Any) -> Node:
        return _item(self, key)

    def reshape(self, *shape: int) -> Node:
        """Return the array in another shape."""
        return _reshape(self, shape)

    def swap(self, a: int, b: int) -> Node:
        """Return the array with two axes swapped."""
        return _swap(self, a, b)

    def sum(self, axis: int) -> Node:
        """Return the sums along an axis, which is kept with length 1."""
        return _sum(self, axis)

    def receive(self, g: Array | PartOf) -> None:
        """Add `g` to the gradient."""
        if isinstance(g, PartOf):
            if self.grad is None:
                self.grad = array_module(self.value).zeros_like(self.value)
            elif not self._owned:
                self.grad = self.grad.copy()
            self._owned = True
            self.grad[g.key] += g.g
        elif self.grad is None:
            self.grad = g
        elif self._owned:
            self.grad += g
        else:
            self.grad, self._owned = self.grad + g, True


class Tape:
    """The operations of a computation, in order."""

    def __init__(self) -> None:
        self._steps: list[tuple[Node, tuple[Node | None, ...], Backward | tuple[Backward, ...]]] = []

    def leaf(self, value: Array) -> Node:
        """Return an input of the computation."""
        return Node(value, self)

    def record(self, node: Node, inputs: tuple[Node | None, ...], back: Backward | tuple[Backward, ...]) -> None:
        """Add the operation that made `node` from `inputs`."""
        self._steps.append((node, inputs, back))

    def backward(self, ends: Iterable[tuple[Node, Array]]) -> None:
        """Compute the gradient of every leaf from the gradients at the `ends`; may be called once.

        A derivative must not change the gradient that it gets. What a step kept is freed when it is done.
        """
        for node, g in ends:
            node.receive(g)
        while self._steps:
            node, inputs, back = self._steps.pop()
            if node.grad is None:
                continue
            g, node.grad = node.grad, None
            if isinstance(back, tuple):
                found: Any = (None if i is None else d(g) for i, d in zip(inputs, back, strict=False))
            else:
                found = back(g)
                found = found if isinstance(found, tuple) else (found,)
            for i, d in zip(inputs, found, strict=False):
                if i is not None:
                    i.receive(d)


def primitive(operation: Operation) -> Callable[..., Node]:
    """Turn an operation on arrays into one on nodes, which its tape records.

    operation: returns its result and the derivative: a function from the gradient at the result to the gradient at the
    first positional argument or a tuple of those at all, or a tuple of such functions, one for each argument. Arguments
    that are no nodes are constants.
    """

    @functools.wraps(operation)
    def run(*args: Any, **options: Any) -> Node:
        value, back = operation(*(a.value if isinstance(a, Node) else a for a in args), **options)
        inputs = tuple(a if isinstance(a, Node) and a.tape is not None else None for a in args)
        tape = next((i.tape for i in inputs if i is not None), None)
        node = Node(value, tape)
        if tape is not None:
            tape.record(node, inputs, back)
        return node

    return run


def _reduce(g: Array, like: Any) -> Array:
    """Sum the gradient of a broadcast result over the axes that `like` does not have."""
    if g.shape == like.shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - like.ndim)))
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=axes, keepdims=True) if axes else g


@primitive
def _add(a: Any, b: Any) -> tuple[Array, tuple[Backward, ...]]:
    return a + b, (lambda g: _reduce(g, a), lambda g: _reduce(g, b))


@primitive
def _subtract(a: Any, b: Any) -> tuple[Array, tuple[Backward, ...]]:
    return a - b, (lambda g: _reduce(g, a), lambda g: _reduce(-g, b))


@primitive
def _multiply(a: Any, b: Any) -> tuple[Array, tuple[Backward, ...]]:
    return a * b, (lambda g: _reduce(g * b, a), lambda g: _reduce(g * a, b))


@primitive
def _divide(a: Any, b: Any) -> tuple[Array, tuple[Backward, ...]]:
    value = a / b
    return value, (lambda g: _reduce(g / b, a), lambda g: _reduce(-g * value / b, b))


@primitive
def _matmul(a: Array, b: Array) -> tuple[Array, tuple[Backward, ...]]:
    return a @ b, (
        lambda g: _reduce(g @ b.swapaxes(-1, -2), a),
        lambda g: _reduce(a.swapaxes(-1, -2) @ g, b),
    )


@primitive
def _item(a: Array, key: Any) -> tuple[Array, Backward]:
    return a[key], lambda g: PartOf(key, g)


@primitive
def _reshape(a: Array, shape: tuple[int, ...]) -> tuple[Array, Backward]:
    return a.reshape(shape), lambda g: g.reshape(a.shape)


@primitive
def _swap(a: Array, i: int, j: int) -> tuple[Array, Backward]:
    return a.swapaxes(i, j), lambda g: g.swapaxes(i, j)


@primitive
def _sum(a: Array, axis: int) -> tuple[Array, Backward]:
    return a.sum(axis=axis, keepdims=True), lambda g: array_module(g).broadcast_to(g, a.shape)
