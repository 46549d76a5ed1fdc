"""Put the functions of a mutated file in place of those that are loaded.

    swap_functions(module, original source, mutated source) -> False: it has to be imported anew
    MutantFinder                                            imports it from a source in memory

Importing our package takes longer than most of its unit tests. A mutant inside of functions needs
no import: their code objects are replaced, wherever the functions are referred to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any


class MutantFinder(MetaPathFinder):
    """Import one module from a source in memory instead of its file."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name = name
        self.path = path
        self.source = source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != self.name:
            return None
        loader = MutantLoader(fullname, str(self.path))
        loader.source = self.source
        return spec_from_file_location(fullname, self.path, loader=loader)


class MutantLoader(SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        return compile(self.source, self.path, "exec")


def swap_functions(module: ModuleType, original: str, mutated: str) -> bool:
    """Replace the code of changed functions; return False if something else changes."""
    path = str(module.__file__)
    before = compile(original, path, "exec")
    after = compile(mutated, path, "exec")
    if _get_outer_parts(before) != _get_outer_parts(after):
        return False
    new_codes = dict(_iter_function_codes(after))
    changed: dict[tuple[str, int], CodeType] = {}
    for key, code in _iter_function_codes(before):
        if key not in new_codes:
            return False
        if new_codes[key] != code:
            changed[key] = new_codes[key]
    swapped: set[tuple[str, int]] = set()
    for function in _iter_functions(module):
        key = (function.__code__.co_qualname, function.__code__.co_firstlineno)
        if key in changed:
            function.__code__ = changed[key]
            swapped.add(key)
    return bool(changed) and swapped == set(changed)


def _is_class_body(code: CodeType) -> bool:
    return "__qualname__" in code.co_names and "__module__" in code.co_names


def _get_outer_parts(code: CodeType) -> list[Any]:
    """Return what a module and its class bodies do, without the functions that they define."""
    parts: list[Any] = [code.co_code, code.co_names]
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            parts.append((type(constant), constant))
        elif _is_class_body(constant):
            parts.append(_get_outer_parts(constant))
    return parts


def _iter_function_codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """Yield (qualified name, first line) and code of each function of a module and its classes."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if _is_class_body(constant):
                yield from _iter_function_codes(constant)
            else:
                yield (constant.co_qualname, constant.co_firstlineno), constant


def _iter_functions(owner: ModuleType | type) -> Iterator[FunctionType]:
    """Yield the functions of a module and of its classes, without their decorators."""
    for value in list(vars(owner).values()):
        if inspect.isclass(value) and value.__module__ == getattr(owner, "__name__", ""):
            yield from _iter_functions(value)
        for attribute in (value, *(getattr(value, name, None) for name in ("fget", "func"))):
            function = inspect.unwrap(getattr(attribute, "__func__", attribute))  # type: ignore[arg-type]
            if isinstance(function, FunctionType):
                yield function
