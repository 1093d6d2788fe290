"""The record that a merge writes about itself: its name in each format, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

RECORD = "ckptsurgeon.json"  # the entry of a torch zip file
METADATA = "ckptsurgeon"  # the key of a safetensors file's metadata


def parse_provenance(raw: bytes | str) -> Mapping[str, Any] | None:
    """A merge's record about itself; None where it can't be read, since a bad record is no reason to refuse weights."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    fresh = record.get("fresh") if isinstance(record, dict) else None
    return record if isinstance(fresh, list) and all(isinstance(key, str) for key in fresh) else None
