"""Adapters that choose rows: by number, or by what stands for a row in two lists."""
