"""tokenferry under the names of DeepEP: ``deep_ep`` and ``deep_ep_cpp``.

Both are ordinary modules in this directory. :func:`install` lets this process import them under their top-level
names; the distribution tokenferry-deep-ep (``compat-dist/``) does so for every process of an environment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from tokenferry.buffer import Buffer
from tokenferry.errors import TokenferryError

__all__ = ["check_alone", "install", "uninstall"]

NAMES = ("deep_ep", "deep_ep_cpp")
DISTRIBUTION = "tokenferry-deep-ep"
_OTHERS = ("deep-ep", "sgl-deep-ep")


class _Finder(MetaPathFinder):
    """Finds the two top-level modules here; their submodules are found along ``__path__``, as everywhere."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, __path__, target) if fullname in NAMES else None


def install() -> None:
    """Let ``import deep_ep`` and ``import deep_ep_cpp`` mean tokenferry in this process. May be called again.

    Processes started from this one have to call it too, unless they are forked. Does nothing where the distribution
    tokenferry-deep-ep is installed.

    Raises:
        TokenferryError: there is another module of these names; nothing was changed.
        ImportError: tokenferry-deep-ep is installed together with another deep_ep.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _distribution(DISTRIBUTION) is not None and getattr(importlib.import_module("deep_ep"), "Buffer", 0) is Buffer:
        return
    for name in NAMES:
        if name in sys.modules:
            found = f"is imported already, from {getattr(sys.modules[name], '__file__', 'nowhere')}"
        elif (spec := util.find_spec(name)) is not None:
            found = f"is there, at {spec.origin or list(spec.submodule_search_locations or ())}"
        else:
            continue
        raise TokenferryError(f"another {name} {found}: tokenferry takes this name only where nobody else has it")
    sys.meta_path.append(_Finder())


def uninstall() -> None:
    """Undo :func:`install`. What was imported from the modules stays valid."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
            del sys.modules[name]


def check_alone() -> None:
    """Refuse to be imported as ``deep_ep`` beside another distribution of it; called by tokenferry-deep-ep.

    Raises:
        ImportError: pip installed another one into the same directory, so each has lost files to the other.
    """
    for name in _OTHERS:
        other = _distribution(name)
        if other is not None:
            where, remove = other.locate_file(""), f"pip uninstall {DISTRIBUTION} {other.name}"
            raise ImportError(
                f"both {DISTRIBUTION} and {other.name} {other.version} (in {where}) install the module deep_ep, "
                f"and each overwrites files of the other. Remove both ({remove}), then install the one you want.",
                name="deep_ep",
            )


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
