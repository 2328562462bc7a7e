"""Models that a command names: ``package.module:factory``, and options given as JSON."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from dsv4fuse.options import OptionError


class FactoryError(ValueError):
    """The name given does not lead to a model and its inputs."""


def parse_options(text: str) -> dict[str, Any]:
    """The mapping that the JSON of ``--options`` holds; its names are checked by the backend."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"--options is not JSON ({error}). Write for example --options '{{\"strict\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise OptionError(f"--options must be a JSON object, not {type(value).__name__}.")
    return value


def arguments(factory: str, asked: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``usual`` the factory takes, by the names of its parameters, and all that was
    ``asked`` for. FactoryError for a thing asked for that it does not take."""
    parameters = inspect.signature(_find(factory)).parameters
    for name in asked:
        if name not in parameters:
            takes = ", ".join(parameters) or "nothing"
            raise FactoryError(f"The factory {factory!r} does not take {name!r}, only: {takes}.")
    return {k: v for k, v in {**usual, **asked}.items() if k in parameters}


def build(factory: str, **sizes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Import and call ``package.module:factory``; returns the model, its args and kwargs."""
    function = _find(factory)
    try:
        made = function(**sizes)
    except Exception as error:
        frames = "".join(traceback.format_exception(error))
        raise FactoryError(f"The factory {factory!r} failed:\n{frames}") from error
    shape = f"The factory {factory!r} must return (model, args) or (model, args, kwargs)"
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise FactoryError(f"{shape}, but it returned {got}.")
    model, args, kwargs = (*made, {})[:3]
    if not callable(model):
        raise FactoryError(f"{shape}, but its model, a {type(model).__name__}, is not callable.")
    if not isinstance(args, (tuple, list)):
        got = type(args).__name__
        raise FactoryError(f"{shape}, but its args are a {got}; write (model, (x,)).")
    if not isinstance(kwargs, dict):
        raise FactoryError(f"{shape}, but its kwargs are a {type(kwargs).__name__}, not a dict.")
    return model, tuple(args), kwargs


def _find(factory: str) -> Any:
    module_name, colon, name = factory.partition(":")
    if not (module_name and colon and name) or "/" in factory:
        raise FactoryError(
            f"{factory!r} is not of the form package.module:factory. For a file "
            f"mymodels/tiny.py with a function make(), write mymodels.tiny:make."
        )
    try:
        # As `python -m` does already; the installed script and the test runner do not.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            text = f"There is no module {missing!r} on sys.path or in {os.getcwd()}."
        else:
            text = f"The module {module_name!r} imports {missing!r}, which is not installed."
        raise FactoryError(text) from error
    except Exception as error:
        frames = "".join(traceback.format_exception(error))
        raise FactoryError(f"The module {module_name!r} does not import:\n{frames}") from error
    if not hasattr(value, name):
        public = [n for n in vars(value) if not n.startswith("_") and callable(vars(value)[n])]
        close = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise FactoryError(f"The module {module_name!r} has no {name!r}.{hint}")
    function = getattr(value, name)
    if not callable(function):
        raise FactoryError(f"{factory!r} is a {type(function).__name__}, not a function.")
    return function
