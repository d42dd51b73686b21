"""Imports that take seconds are phases, wherever they stand: ``loading torch``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ditmoe_cli.cli.interruption import ending_at_once
from ditmoe_cli.progress import phase

SLOW = frozenset({"torch", "torchvision", "transformers", "matplotlib", "scipy", "sklearn"})


class _Announced(Loader):
    """The loader of a module, within a phase; once the module is there, its own loader is in place again."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the loader itself makes of the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and say so; a signal then ends the process at once."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with phase(f"loading {module.__name__}"), ending_at_once():
            self._loader.exec_module(module)


class _Finder(MetaPathFinder):
    """Find the modules of `SLOW` as Python would, and announce them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module's specification, None for all other modules."""
        spec = PathFinder.find_spec(name, path, target) if name in SLOW else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Announced(spec.loader)
        return spec


@contextmanager
def announced_imports() -> Iterator[None]:
    """Announce slow imports as phases while the context lasts."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
