"""Which store a collection is in: a server for a URL, an embedded engine for a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from regrad_qdrant.bank.stores.base import Store, check_name
from regrad_qdrant.bank.stores.client import ClientStore, server_version
from regrad_qdrant.bank.stores.edge import BUSY, EdgeStore
from regrad_qdrant.bank.stores.failures import client_errors
from regrad_qdrant.errors import BankError, StoreUnavailableError

CLIENT_TIMEOUT = 120  # seconds; the client's own default of 5 s is too short for atoms

LOSING = ("1.19.0",)  # versions that may lose acknowledged points after a write in place (qdrant/qdrant#10201)


def open_store(
    collection: str, *, url: str | None = None, api_key: str | None = None, path: str | Path | None = None
) -> Store:
    """The store of a collection: a running server for `url`; for `path` an embedded folder.

    A folder that `QdrantClient(path=…)` made is opened by that client, any other one holds Edge shards.
    """
    if url is not None:
        from qdrant_client import QdrantClient

        with client_errors(collection):
            client = QdrantClient(url=url, api_key=api_key, timeout=CLIENT_TIMEOUT, check_compatibility=False)
            client.get_collections()
            _warn_of(client)
        return ClientStore(client, collection, owns_client=True)
    folder = Path(path or "regrad_bank")
    check_name(collection)
    if (folder / "meta.json").is_file():
        from qdrant_client import QdrantClient

        try:
            return ClientStore(QdrantClient(path=str(folder)), collection, owns_client=True)
        except RuntimeError as error:
            raise StoreUnavailableError(f"the folder {folder} {BUSY}: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise BankError(f"{folder} is a file; --path wants a folder")
    return EdgeStore(folder / collection)


def _warn_of(client: Any) -> None:
    """Say so where the server's version is known to lose points; one that does not tell its version is let pass."""
    version = server_version(client.info)
    if version in LOSING:
        warnings.warn(
            f"Qdrant {version} may lose acknowledged points after atoms are written in place (qdrant/qdrant#10201): "
            "use another version, or a sidecar",
            stacklevel=3,
        )
