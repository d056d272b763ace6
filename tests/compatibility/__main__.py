"""``python -m tests.compatibility``: try everything on two CPU ranks and write docs/compatibility.md."""

from __future__ import annotations

import os

from tests.compatibility import ROWS, run
from tests.compatibility.page import PAGE, render
from tests.compatibility.rows import NUM_RANKS
from tokenferry.cli.ranks import RankPool

if __name__ == "__main__":
    os.environ["TOKENFERRY_DEVICE"] = "cpu"
    with RankPool(NUM_RANKS, num_threads=1) as pool:
        first, second = pool.run(run, list(ROWS))
    wrong = {key: (first[key], second[key]) for key in ROWS if first[key] != second[key] or "failed" in first[key]}
    for key, statuses in wrong.items():
        print(*key, *statuses, sep="\n  ")
    if wrong:
        raise SystemExit(f"{len(wrong)} checks failed: {PAGE} is as it was")
    PAGE.write_text(render(first))
    print(f"{PAGE}: {len(first)} rows")
