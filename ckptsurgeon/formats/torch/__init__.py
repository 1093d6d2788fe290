"""torch's own containers: the zip archive since 1.6, and the legacy file before it."""
