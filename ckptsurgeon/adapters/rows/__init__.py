"""Adapters that choose rows: by number, or by the tokens or labels that two lists have in common."""
