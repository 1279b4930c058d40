"""A cache on disk of teacher features, looked up by image content.

It spares training on a CPU the repeated forward passes of a slow teacher.
"""

import hashlib
import sqlite3
import sys

import torch

from gear.files import cache_dir
from gear.images import to_float, to_uint8

# size of every computed batch, which is padded if need be, because the last bits of a feature
# depend on the batch size
CHUNK = 8
HASH = 16  # length in bytes of the hash at the end of a row
LIMIT = 1 << 32  # largest size of the file in bytes


class FeatureCache:
    """The features that `compute` gives, (8, 3, H, W) -> (8, L, dim), stored as float16.

    Computed and stored features have the same bits. An image is looked up by its uint8 pixels and
    by `identity`, a text with everything else on which the features depend. The file is
    `features.sqlite` in the cache folder, and processes share it. If it cannot be used, this is
    reported once and missing features are computed. A row consists of features and their hash; a
    truncated or changed row is computed again.
    """

    def __init__(self, identity, dim, compute):
        self.identity = identity
        self.dim = dim
        self.compute = compute
        self._database = None
        self._failed = set()  # actions that failed

    def __call__(self, images):
        """Return the features of images (B, 3, H, W) in [-1, 1]: (B, L, dim) float16."""
        pixels = to_uint8(images)
        keys = [self._key(image) for image in pixels]
        features = self._attempt(self._look_up, keys) or {}
        missing = {key: image for key, image in zip(keys, pixels) if key not in features}
        if missing:
            computed = dict(zip(missing, self._compute(torch.stack(list(missing.values())))))
            self._attempt(self._store, computed)
            features |= computed
        return torch.stack([features[key] for key in keys])

    def _key(self, image):
        # the number of threads and the version of PyTorch also change the last bits of a feature
        header = (
            f"{self.identity}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{tuple(image.shape)}: "
        )
        return hashlib.sha256(header.encode() + image.numpy().tobytes()).digest()

    @torch.no_grad()
    def _compute(self, pixels):
        """Compute the features of uint8 images in batches of CHUNK: (N, L, dim) float16."""
        chunks = []
        for chunk in to_float(pixels).split(CHUNK):
            padded = torch.cat([chunk, chunk[-1:].expand(CHUNK - len(chunk), -1, -1, -1)])
            chunks.append(self.compute(padded)[: len(chunk)].half())
        return torch.cat(chunks)

    def _attempt(self, action, argument):
        """Return `action(database, argument)`, called in one transaction, or None where it fails.

        An action that failed is not tried again. The other one still is: a full file can be read.
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
                    f"The cache {path} cannot be used further ({error}). Delete it to start a new "
                    "one.",
                    file=sys.stderr,
                )
            self._failed.add(action)

    def _look_up(self, database, keys):
        """Return {key: features} of the intact rows among `keys`."""
        features = {}
        for key in keys:
            row = database.execute("SELECT value FROM features WHERE key = ?", (key,)).fetchone()
            if row and isinstance(row[0], bytes) and row[0] == _with_hash(row[0][:-HASH]):
                values = torch.frombuffer(bytearray(row[0][:-HASH]), dtype=torch.float16)
                features[key] = values.view(-1, self.dim)
        return features

    def _store(self, database, features):
        rows = [(key, _with_hash(value.numpy().tobytes())) for key, value in features.items()]
        database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)


def _with_hash(content):
    """Return bytes with their hash appended."""
    return content + hashlib.blake2b(content, digest_size=HASH).digest()


def _open(path):
    """Return a connection to the database at `path`, which is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the timeout, in seconds, is for transactions of other processes
    database = sqlite3.connect(path, timeout=60)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    (page,) = database.execute("PRAGMA page_size").fetchone()
    database.execute(f"PRAGMA max_page_count = {LIMIT // page}")
    database.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, value BLOB)")
    return database
