"""Prepared pure functions: decided once, compiled once, called at the price of a dispatch.

A prepared function is a pytree. Its arrays are arguments of the compiled program, so that new
parameters of a network compile nothing; all the rest (shapes, names, Python numbers) is fixed in
it. What can be known of an instance is found out at its first call and kept beside it, not in it: a
pytree holds nothing but its fields.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.custom_derivatives import SymbolicZero

from jaxdiff import _check

_ARRAYS = (jax.Array, np.ndarray, np.generic)
_NUMBERS = (*_ARRAYS, int, float, complex)


class _Split(NamedTuple):
    """A pytree in two: its arrays, and what a program of it is compiled for.

    `fixed` has the type and the value of every other leaf (1, 1.0 and True are not the same), and
    None where an array was.
    """

    arrays: list[Any]
    tree: Any
    fixed: tuple[tuple[type, Any] | None, ...]


class _Same:
    """A value that cannot be hashed, known by its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _fixed(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return _Same, _Same(leaf)
    return type(leaf), leaf


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, _NUMBERS) and leaf.__class__ is not bool


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, _ARRAYS)


def _split(value: Any, is_dynamic: Callable[[Any], bool]) -> _Split:
    leaves, tree = jax.tree.flatten(value)
    dynamic = list(map(is_dynamic, leaves))
    arrays = [leaf for leaf, is_array in zip(leaves, dynamic, strict=True) if is_array]
    pairs = zip(leaves, dynamic, strict=True)
    return _Split(arrays, tree, tuple(None if d else _fixed(leaf) for leaf, d in pairs))


def _join(arrays: list[Any], tree: Any, fixed: tuple[Any, ...]) -> Any:
    given = iter(arrays)
    leaves = [next(given) if leaf is None else leaf[1] for leaf in fixed]
    return jax.tree.unflatten(tree, [a.value if isinstance(a, _Same) else a for a in leaves])


@functools.lru_cache(maxsize=4096)
def _program(method: Callable[..., Any], here: Any, there: Any) -> Any:
    """Return the compiled `method(instance, *args)` for all that differ in arrays only."""

    def run(own: list[Any], given: Any) -> Any:
        args = given if there is None else _join(given, *there)
        return method(_join(own, *here), *args)

    return jax.jit(run)


class _Known(NamedTuple):
    """What is known of an instance: its arrays, the rest of it, and its programs."""

    arrays: list[Any]
    here: Any
    programs: dict[Any, Any]


def _know(instance: Any) -> _Known:
    arrays, *here = _split(instance, _is_array)
    if not any(isinstance(leaf, Tracer) for leaf in arrays):
        with eval_context():  # NumPy arrays go to the device once, and not at every call
            arrays = [jnp.asarray(leaf) for leaf in arrays]
    return _Known(arrays, tuple(here), {})


_KNOWN: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def call(method: Callable[..., Any], instance: Any, *args: Any) -> Any:
    """Return `method(instance, *args)` from a program that is compiled once.

    Args:
        method: a function of a module, pure.
        instance: a pytree; what is known of a `Prepared` one is kept.
        *args: pytrees; numbers and arrays in them are dynamic, all other leaves fixed.
    """
    known = _KNOWN.get(instance) if isinstance(instance, Prepared) else None
    if known is None:
        known = _know(instance)
        if isinstance(instance, Prepared):
            _KNOWN[instance] = known
    given: Any = args
    there = None
    if not all(map(_is_number, jax.tree.leaves(args))):
        given, *rest = _split(args, _is_number)
        there = tuple(rest)
    program = known.programs.get((method, there))
    if program is None:
        program = known.programs[method, there] = _program(method, known.here, there)
    return program(known.arrays, given)


class Prepared(eqx.Module):
    """A prepared function; two of them are the same only if they are one object."""

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@jax.custom_jvp
def _still(leaf: Any) -> Any:
    return leaf


@functools.partial(_still.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> Any:
    if not isinstance(tangents[0], SymbolicZero):
        expected = (
            "anything but the process of a prepared function, of which its coefficients were made "
            "before: prepare inside the derivative"
        )
        raise _check.bad("derivative", "what is differentiated", expected, "that process")
    return primals[0], tangents[0]


def hold_still(model: Any, part: Any) -> Any:
    """Return a model that refuses derivatives by a part of it.

    For the part that coefficients were made of: a derivative of what is left of it would be wrong
    without a word.
    """
    leaves = {id(leaf) for leaf in jax.tree.leaves(part) if eqx.is_inexact_array(leaf)}
    return jax.tree.map(lambda leaf: _still(leaf) if id(leaf) in leaves else leaf, model)
