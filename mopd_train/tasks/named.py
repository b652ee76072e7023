"""Data inside installed packages: found without importing them, whose imports may need much more."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any


def package_file(package: str, path: str, install: str) -> Path:
    """A file of an installed package. ImportError with the command that installs it."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / path).exists():
        raise ImportError(f"this set is the file {path} of the package {package}: {install}")
    return folder / path


def read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle if line.strip()]
