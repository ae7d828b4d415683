"""What a server inside vLLM is told, by the environment: vLLM's own command line knows no options of plugins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.errors import DataError

COLLECTION = "REGRAD_COLLECTION"
DEFAULT_INIT = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Settings:
    """As the options of `regrad-qdrant serve` have it; each is `REGRAD_` and its name in capitals."""

    collection: str
    url: str | None = None  # QDRANT_URL
    api_key: str | None = None  # QDRANT_API_KEY: Qdrant's; clients' keys are vLLM's own --api-key
    path: Path | None = None  # of an embedded bank
    init: str = DEFAULT_INIT
    payload_key: str = DEFAULT_KEY
    icl_init: str | None = None
    icl_payload_key: str | None = None
    using: tuple[str, ...] = ()  # with commas between
    dense: str | None = None
    text_path: str | None = None
    sidecar: str | None = None
    tenants: Path | None = None
    queue: int = 256
    deadline: float = 60.0

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """What the environment says.

        Raises:
            DataError: where it lacks the collection, or a value makes no sense.
        """
        given = os.environ if environment is None else environment
        known = {f"REGRAD_{name.upper()}": name for name in cls.__dataclass_fields__ if name not in ("url", "api_key")}
        found = {known[name]: value for name, value in given.items() if name in known and value}
        if "collection" not in found:
            raise DataError(f"{COLLECTION} is not set: it names the Qdrant collection")
        if ("icl_init" in found) != ("icl_payload_key" in found):
            raise DataError("REGRAD_ICL_INIT and REGRAD_ICL_PAYLOAD_KEY belong together")
        texts = {name: value for name, value in found.items() if name in _TEXTS}
        try:
            return cls(
                **texts,
                url=given.get("QDRANT_URL") or None,
                api_key=given.get("QDRANT_API_KEY") or None,
                path=Path(found["path"]) if "path" in found else None,
                tenants=Path(found["tenants"]) if "tenants" in found else None,
                using=tuple(found["using"].split(",")) if "using" in found else (),
                queue=int(found.get("queue", cls.queue)),
                deadline=float(found.get("deadline", cls.deadline)),
            )
        except ValueError as error:
            raise DataError(f"REGRAD_QUEUE and REGRAD_DEADLINE are numbers: {error}") from error

    @property
    def initializations(self) -> tuple[str, ...]:
        return (self.init,) if self.icl_init is None else (self.init, self.icl_init)


_TEXTS = (
    "collection", "init", "payload_key", "icl_init", "icl_payload_key", "dense", "text_path", "sidecar",
)  # fmt: skip
