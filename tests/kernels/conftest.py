"""Kernels without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``.

Triton reads the variable when it is imported, and a process interprets all of its kernels or none: the ordinary run,
without the variable, passes this folder by.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter

    interpreter.install()
else:
    collect_ignore_glob = ["*"]
