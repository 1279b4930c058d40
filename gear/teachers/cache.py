"""Features of images seen before, kept on disk by content: training on a CPU looks up what a slow
teacher computed once.
"""

import hashlib
import sqlite3
import sys

import torch

from gear.files import cache_dir
from gear.images import to_float, to_uint8

# images computed at once, always: the last bits of a feature depend on the size of the batch it is
# computed in
CHUNK = 8
HASH = 16  # bytes at the end of a row
LIMIT = 1 << 32  # bytes of the file


class FeatureCache:
    """What `compute` makes of images, (8, 3, H, W) -> (8, L, dim), in float16 and the same bits
    whether computed or found.

    An image is looked up by its uint8 pixels, under `identity`: what else the features depend on.
    The file, `features.sqlite` in the cache folder, is shared by processes. Where it cannot be
    used, that is said once and what it lacks is computed. A row is features and their hash: one
    that was cut short or changed is computed again.
    """

    def __init__(self, identity, dim, compute):
        self.identity, self.dim, self.compute = identity, dim, compute
        self._database, self._failed = None, set()

    def __call__(self, images):
        """Return the features of images (B, 3, H, W) in [-1, 1]: (B, L, dim) float16."""
        pixels = to_uint8(images)
        keys = [self._key(image) for image in pixels]
        features = self._attempt(self._find, keys) or {}
        missing = {key: image for key, image in zip(keys, pixels) if key not in features}
        if missing:
            computed = dict(zip(missing, self._compute(torch.stack(list(missing.values())))))
            self._attempt(self._keep, computed)
            features |= computed
        return torch.stack([features[key] for key in keys])

    def _key(self, image):
        # Threads and library stand in the key because they, too, change the last bits.
        header = (
            f"{self.identity}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{tuple(image.shape)}: "
        )
        return hashlib.sha256(header.encode() + image.numpy().tobytes()).digest()

    @torch.no_grad()
    def _compute(self, pixels):
        chunks = []
        for chunk in to_float(pixels).split(CHUNK):
            padded = torch.cat([chunk, chunk[-1:].expand(CHUNK - len(chunk), -1, -1, -1)])
            chunks.append(self.compute(padded)[: len(chunk)].half())
        return torch.cat(chunks)

    def _attempt(self, action, argument):
        """Call `action(database, argument)` in one transaction. What failed is not tried again: a
        full file is still read.
        """
        if action in self._failed:
            return None
        path = cache_dir() / "features.sqlite"
        try:
            self._database = self._database or _open(path)
            with self._database:
                return action(self._database, argument)
        except (OSError, sqlite3.Error) as error:
            if not self._failed:
                print(
                    f"The cache {path} cannot be used further ({error}). Delete it to start anew.",
                    file=sys.stderr,
                )
            self._failed.add(action)

    def _find(self, database, keys):
        found = {}
        for key in keys:
            row = database.execute("SELECT value FROM features WHERE key = ?", (key,)).fetchone()
            if row and isinstance(row[0], bytes) and row[0] == _hashed(row[0][:-HASH]):
                found[key] = torch.frombuffer(bytearray(row[0][:-HASH]), dtype=torch.float16).view(
                    -1, self.dim
                )
        return found

    def _keep(self, database, features):
        rows = [(key, _hashed(value.numpy().tobytes())) for key, value in features.items()]
        database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)


def _hashed(value):
    return value + hashlib.blake2b(value, digest_size=HASH).digest()


def _open(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    # seconds to wait for another process's transaction
    database = sqlite3.connect(path, timeout=60)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    (page,) = database.execute("PRAGMA page_size").fetchone()
    database.execute(f"PRAGMA max_page_count = {LIMIT // page}")
    database.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, value BLOB)")
    return database
