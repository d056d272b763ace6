"""Every argument of every public method, tried; the page docs/compatibility.md is what comes of it."""

from tests.compatibility import construction as construction
from tests.compatibility import elastic as elastic
from tests.compatibility import elastic_operations as elastic_operations
from tests.compatibility import high_throughput as high_throughput
from tests.compatibility import low_latency as low_latency
from tests.compatibility import small as small
from tests.compatibility.rows import ROWS, run

__all__ = ["ROWS", "run"]
