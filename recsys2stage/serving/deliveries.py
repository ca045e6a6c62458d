"""Deliveries of events that carry a key: one that comes again, to any worker or after a restart, is kept once.

A sender that gets no answer cannot know whether its events were kept, and sends them again under the same key. Only
salted hashes of key and content are kept, for `KEPT` seconds.
"""

import hashlib
import sqlite3
import time
from dataclasses import dataclass
from typing import Literal

KEPT = 86_400.0  # seconds that a key is remembered
MAX_KEY = 255  # characters of a key
# made also in stores of earlier versions, which ignore it
TABLES = (
    "CREATE TABLE IF NOT EXISTS deliveries (key_hash BLOB PRIMARY KEY, content_hash BLOB NOT NULL, time REAL NOT NULL) "
    "WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS deliveries_time ON deliveries (time)",
)


@dataclass
class Delivery:
    """A delivery of events under a key; `outcome` is set once it is written.

    Args:
        key: of the sender.
        content: what is delivered, as text.
    """

    key: str
    content: str
    outcome: Literal["new", "repeated", "other"] = "new"  # other: the key was used for something else

    def claim(self, connection: sqlite3.Connection, salt: bytes) -> bool:
        """Whether the key is new. Call it in the transaction that writes the events."""
        key, content = (
            hashlib.blake2b(text.encode(), key=salt, digest_size=16).digest() for text in (self.key, self.content)
        )
        now = time.time()
        connection.execute("DELETE FROM deliveries WHERE time < ?", (now - KEPT,))
        row = connection.execute("SELECT content_hash FROM deliveries WHERE key_hash = ?", (key,)).fetchone()
        if row is None:
            connection.execute("INSERT INTO deliveries VALUES (?, ?, ?)", (key, content, now))
            return True
        self.outcome = "repeated" if row[0] == content else "other"
        return False
