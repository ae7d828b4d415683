"""Where models are kept that were fetched or dequantized."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Below XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regrad-qdrant"
