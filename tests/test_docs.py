"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import jaxdiff

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(jaxdiff.__path__, "jaxdiff.")
    if info.name not in ("jaxdiff.cli", "jaxdiff.demo")
)


def test_the_modules_are_found():
    assert {"jaxdiff.process", "jaxdiff.solvers.engine", "jaxdiff.train.loop"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, defaults):
    names = {"jax": jax, "jnp": jax.numpy}
    assert doctest.testmod(importlib.import_module(name), extraglobs=names).failed == 0
