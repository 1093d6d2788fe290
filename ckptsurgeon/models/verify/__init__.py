"""The proof: a written file loaded by the official readers on a device, read back, and compared."""
