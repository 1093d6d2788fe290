"""One file a command: its arguments, one call of the library, its answer shown. Nothing is decided here."""
