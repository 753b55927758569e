"""Side-by-side measurements against peers: `python -m benchmarks --help`."""

import lm  # noqa: F401 - before torch: it says how torch's threads wait
