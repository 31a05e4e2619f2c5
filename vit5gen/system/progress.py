"""The progress of long work: a bar on a terminal; elsewhere, where all that is written stays, a plain line at times."""

import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS = 60  # between plain lines


class Progress(tqdm):
    """Counts to ``total``: tqdm's bar where stderr is a terminal, plain lines where it is a file, a pipe or a notebook.

    every: a plain line at each multiple and at the last count; without it there is one a minute.
    silent: show nothing; of processes other than the main one.
    """

    def __init__(
        self, desc: str, total: int, unit: str, initial: int = 0, silent: bool = False, every: int | None = None
    ) -> None:
        self._plain = not (silent or sys.stderr.isatty())
        self.desc, self.postfix, self._first, self._every, self._counted = desc, None, initial, every, unit
        hidden, delay = silent or self._plain, 0 if every else 1
        super().__init__(desc=desc, total=total, unit=unit, initial=initial, disable=hidden, delay=delay)
        self._begun = self._updated = self._told = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more."""
        if self._plain:
            before, self.n, self._updated = self.n, self.n + (n or 0), time.monotonic()
            if self._every is None:
                self.refresh()
            elif self.n == self.total or self.n // self._every > before // self._every:
                self._tell()
        return super().update(n)  # does nothing unless there is a bar, as the methods below

    def refresh(self, *args: Any, **options: Any) -> None:
        """Show what has changed: at once in a bar, by a plain line after a minute without one."""
        if self._plain and time.monotonic() - self._told >= _SECONDS:
            self._tell()
        super().refresh(*args, **options)

    def unpause(self) -> None:
        """Leave the time since the last count out of the rate."""
        self._begun, self._updated = self._begun + time.monotonic() - self._updated, time.monotonic()
        super().unpause()

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = (self.n - self._first) / max(self._updated - self._begun, 1e-9)
        left = tqdm.format_interval(((self.total or 0) - self.n) / rate) if rate else "unknown"
        shown = f", {self.postfix}" if self.postfix else ""
        done = f"{self.desc.removesuffix(': ')}: {self.n}/{self.total} {self._counted}s{shown}"
        print(f"{done}, {rate:.3g} {self._counted}s/s, time left {left}", file=sys.stderr, flush=True)
