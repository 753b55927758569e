"""numpy, imported on first use: for modules that `lm --help` reads the options of, and that compute only later.

from lm.late_numpy import np
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Numpy:
    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module("numpy"), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import numpy as np
else:
    np = _Numpy()

__all__ = ["np"]
