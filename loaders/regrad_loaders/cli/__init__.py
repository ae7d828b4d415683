"""The commands that need the loaders: train, eval, bench, demo and import-checkpoint.

Each is an entry point of the group that the client's command reads (`regrad_qdrant.cli.app`).
"""

from importlib.util import find_spec

from regrad_qdrant.errors import MissingExtraError

_NEEDED = {"accelerate": "accelerate", "yaml": "pyyaml", "matplotlib": "matplotlib"}  # import name: package

if _LACKING := [package for name, package in _NEEDED.items() if find_spec(name) is None]:
    raise MissingExtraError(f"needs {', '.join(_LACKING)}: pip install 'regrad-qdrant[loaders]'")
