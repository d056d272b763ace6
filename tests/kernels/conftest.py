"""Kernels without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``.

Triton reads the variable when it is imported, and a process interprets all of its kernels or none: the ordinary run,
without the variable, passes this folder by.
"""

from __future__ import annotations

import gc
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter

    interpreter.install()
    gc.set_threshold(100_000, 20, 100)  # it makes many objects, and hardly a cycle
else:
    collect_ignore_glob = ["*"]
