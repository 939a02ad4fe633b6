"""What a checkpoint must hold: the manifest with size and sha256 of every file, and of itself."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
FORMAT = 2


class Damaged(ValueError):
    """A checkpoint whose files are not what its manifest says."""


def file_name(name: str, expert: int | None = None) -> str:
    """Return the file that holds a module: ``gate.safetensors``, or ``expert-0003.safetensors`` for "expert 3"."""
    return f"{name if expert is None else f'{name.split()[0]}-{expert:04d}'}.safetensors"


def entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def digest(manifest: dict[str, Any]) -> str:
    """Return the checksum of a manifest's content but for the checksum itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        Damaged: it is missing or not a manifest.
        ValueError: another version's.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError:  # cut, or no text at all
        raise Damaged(f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
        raise Damaged(f"{MANIFEST} differs from its checksum")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / MANIFEST} has format {manifest.get('format')}, expected {FORMAT}: use the version that wrote it"
        )
    if not isinstance(manifest.get("num_experts"), int) or not isinstance(manifest.get("files"), dict):
        raise Damaged(f"{MANIFEST} lacks num_experts or files")
    for name, entry in manifest["files"].items():
        if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise Damaged(f"{MANIFEST} has an entry that no checkpoint has: {name!r}")
    return manifest


def missing_or_extra(path: Path, manifest: dict[str, Any]) -> None:
    """Check the expert files of a checkpoint against the number of experts.

    Raises:
        ValueError: an expert is missing, or one is there that does not belong; it is named.
    """
    expected = {file_name("expert", e): e for e in range(manifest["num_experts"])}
    for name, e in expected.items():
        if name not in manifest["files"] or not (path / name).exists():
            raise ValueError(
                f"checkpoint {path} lacks expert {e} ({name}): put the file back, or remove the whole checkpoint"
            )
    extra = sorted({p.name for p in path.glob("expert-*.safetensors")} - set(expected))
    if extra:
        raise ValueError(f"checkpoint {path} has {extra[0]}, but only {len(expected)} experts: remove that file")


def verify_file(path: Path, name: str, manifest: dict[str, Any]) -> None:
    """Check a file against its manifest.

    Raises:
        Damaged: its size or checksum differs.
    """
    try:
        found = entry(path / name)
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    expected = manifest["files"][name]
    if found["bytes"] != expected["bytes"]:
        raise Damaged(f"{name} has {found['bytes']} bytes, expected {expected['bytes']}")
    if found["sha256"] != expected["sha256"]:
        raise Damaged(f"{name} differs from its checksum")
