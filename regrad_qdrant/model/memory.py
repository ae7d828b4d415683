"""What glibc does with memory that tensors free, where the system is one that has it; and what a process holds."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any


def keep_freed_memory() -> None:
    """Keep it: in training, giving it back costs page faults in every step."""
    libc = _libc()
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never; what fits an int, 2 GB, is less than a step frees
        libc.mallopt(m_top_pad, 2**28)


def give_back_memory() -> None:
    """Give it back now: in ingestion, batches of ever other sizes leave it in pieces that add up."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def anonymous_megabytes() -> float:
    """What this process holds, without the pages of mapped files, which the kernel takes back when it needs them; 0
    where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text(encoding="utf-8").split("RssAnon:")[1].split()[0]) / 1024 if status.exists() else 0.0


def available_bytes() -> float:
    """What this machine's processes can still take; without bound where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return math.inf
    return int(info.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]) * 1024.0


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
