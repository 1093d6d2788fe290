"""How much a header may cost. One table, so that no reader has a bound of its own."""

from __future__ import annotations

PICKLE_BYTES = 1 << 30
PICKLE_STEPS = 200_000_000
LONG_BYTES = 4096
DEPTH = 64
JSON_BYTES = 100_000_000  # what the safetensors library allows for its header
ZIP_ENTRIES = 4_000_000
PLACE_CHARACTERS = 1 << 25  # of the dotted places of all values
EXTRA_STATE_BYTES = 1 << 26
DIRECTORY_BYTES = 1 << 29
INFLATED_HEADER_BYTES = 1 << 20  # beyond the file's own size, for a deflated pickle
INFLATED_BYTES = 1 << 30  # a view that repeats its elements (stride 0) may become this much larger than its storage
