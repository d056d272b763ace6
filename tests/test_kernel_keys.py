"""A kernel has the same key in Triton's cache of files whatever its process has compiled before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytest.importorskip("triton")

_KEYS = """
import json, sys
from tokenferry.dataplane.cuda import launch, low_latency_programs, programs
kernels = [programs._BULK_DISPATCH, programs._NOTIFY, next(iter(low_latency_programs._COMBINE.values()))]
for kernel in kernels:  # compiles nothing
    kernel._kernel.warmup = lambda *values, kernel=kernel, **options: kernel._kernel.cache_key
{}
order = [int(number) for number in sys.argv[1:]]
found = {{number: kernels[number].compile(4, 1) for number in order}}
print(json.dumps([found[number] for number in sorted(found)]))
"""


def keys_in(order: str, before: str = "") -> list[str]:
    """The keys of three kernels, asked for in an order by a new process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _KEYS.format(before), *order]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    found: list[str] = json.loads(answer.stdout)
    return found


def test_keys_do_not_depend_on_the_order() -> None:
    assert keys_in("012") == keys_in("210")
    without = "launch.settle_keys = lambda: None"
    if keys_in("012", without) == keys_in("210", without):
        pytest.skip("this Triton's keys do not need it")


def test_constants_of_one_kernel_have_names_of_their_own() -> None:
    """Else Triton 3.6 sorts them, in the key, by where in memory their modules lie."""
    from triton.language import constexpr

    from tokenferry.dataplane.cuda import (
        expert_major_programs,
        launch,
        low_latency_programs,
        parts_programs,
        programs,
    )

    launch.settle_keys()
    seen = 0
    for module in (programs, parts_programs, expert_major_programs, low_latency_programs):
        for value in vars(module).values():
            for kernel in value.values() if isinstance(value, dict) else (value,):
                if not isinstance(kernel, launch.Kernel):
                    continue
                values: dict[str, set[str]] = defaultdict(set)
                for (name, _), (constant, _) in kernel._kernel.used_global_vals.items():
                    if isinstance(constant, constexpr):
                        values[name].add(str(constant))
                assert all(len(of_name) == 1 for of_name in values.values()), values
                seen += len(values)
    assert seen
