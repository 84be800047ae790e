"""Who is running a cell: whoever holds a lease in the database that has not run out."""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Self

from deepenc.arena.run.store import Store
from deepenc.errors import StoreError

log = logging.getLogger(__name__)

SECONDS = 45.0
"""How long a lease is good for: so long the cells of a run that was killed wait for another to take over."""


class Lease:
    """A run's claim to the cells that it has taken, renewed in the background while it is held.

    Args:
        store: Where it is kept.
        seconds: How long it is good for after each renewal.

    Attributes:
        owner: Name of the run; no other has it.
    """

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self.owner = uuid.uuid4().hex
        self._store, self._seconds = store, seconds
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._store.renew(self.owner, self._seconds)
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        """However the run ends, the cells that it leaves running are planned again."""
        self._over.set()
        self._renewing.join()
        self._store.release(self.owner)

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / 3):
            try:
                self._store.renew(self.owner, self._seconds)
            except StoreError as error:  # the run itself will meet the same trouble, or it was a passing one
                log.warning("could not renew the lease of this run: %s", error)
