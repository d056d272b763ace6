"""Kernels with a fault put in, to see that a test finds it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_FOLDER = tempfile.TemporaryDirectory(prefix="mutants-")
"""Holds the sources, which the interpreter reads when a kernel first runs, until the process ends."""


def mutated_module(
    module: ModuleType, old: str, new: str, count: int = 1, *, entry: ModuleType | None = None
) -> ModuleType:
    """A fresh copy of ``entry``, by default of ``module``; see :func:`mutated_modules`."""
    return mutated_modules(module, old, new, count, entries=[entry or module])[0]


def mutated_modules(
    module: ModuleType, old: str, new: str, count: int = 1, *, entries: Iterable[ModuleType]
) -> list[ModuleType]:
    """Fresh copies of modules of a package, with ``old`` replaced by ``new`` in the source of one of them.

    The other modules of the same package are imported anew too, so that those that import from ``module`` see the
    fault; ``sys.modules`` is afterwards as before, and nobody else meets the copies.

    Args:
        module: The module to change; it lies in a package.
        old: Source text that occurs exactly ``count`` times.
        new: What stands there instead.
        count: Occurrences of ``old``.
        entries: The modules to return, of the same package: say, the kernels that call the changed helper.
    """
    path = mutated_source(module, old, new, count)
    with forgotten(module.__package__), found_at(module.__name__, path):
        return [importlib.import_module(entry.__name__) for entry in entries]


def mutated_source(module: ModuleType, old: str, new: str, count: int = 1) -> Path:
    """Where the source of a module lies, with ``old`` replaced by ``new``."""
    source = Path(module.__file__).read_text()
    if source.count(old) != count:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {module.__name__}, not {count}")
    path = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / Path(module.__file__).name
    path.write_text(source.replace(old, new))
    return path


class _Finder:
    """Finds one module at another place."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.path = path

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path) if name == self.name else None


@contextmanager
def found_at(name: str, path: Path) -> Iterator[None]:
    finder = _Finder(name, path)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def forgotten(package: str) -> Iterator[None]:
    """A package and its modules are not imported yet, for a while."""
    kept = _take_out(package)
    parent_name, _, name = package.rpartition(".")
    parent = sys.modules.get(parent_name)
    try:
        yield
    finally:
        _take_out(package)
        sys.modules.update(kept)
        if parent is not None:
            setattr(parent, name, kept[package])


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}
