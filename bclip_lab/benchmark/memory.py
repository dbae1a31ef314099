"""Peak memory of a piece of work, in a process that does other work before and after it."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["Peak"]

_PROCESS = Path("/proc/self")


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


class Peak:
    """Watch the resident memory of this process from now on.

    A high-water mark only grows, and a worker that is used again keeps what the allocator did not give back, so a cell
    would show what the cells before it needed. Therefore freed memory is returned to the system first (glibc's
    `malloc_trim`) and the kernel's mark is set back (`/proc/self/clear_refs`). Both are Linux's; elsewhere, and where
    the kernel refuses, `megabytes` gives None. All threads of the process count: one cell at a time in a process.

    The allocator still has a say: an epoch of MM-BM, three times in one process with an epoch of MMAC between them,
    took 196, 292 and 315, and those of MMAC 477 and 336. A defence that needs a gibibyte is told from one that needs a
    tenth of it, and no more.

    Examples
    --------
    >>> peak = Peak()
    >>> content = bytearray(50_000_000)
    >>> peak.megabytes() is None or peak.megabytes() >= 47
    True
    """

    def __init__(self) -> None:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            (_PROCESS / "clear_refs").write_text("5")
            self._before: int | None = _status("VmRSS")
        except (OSError, AttributeError, TypeError, ValueError):
            self._before = None

    def megabytes(self) -> float | None:
        """The highest resident memory since then over that at the start, in units of 2**20 bytes."""
        return None if self._before is None else round((_status("VmHWM") - self._before) / 2**20, 1)
