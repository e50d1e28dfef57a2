"""The examples in docstrings run and show what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import virtnet

MODULES = [name for _, name, _ in pkgutil.walk_packages(virtnet.__path__, "virtnet.") if not name.endswith("__main__")]


@pytest.mark.parametrize("name", ["virtnet", *MODULES])
def test_examples_of(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
