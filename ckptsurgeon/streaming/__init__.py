"""Where bytes move: kernel copies, casts one chunk at a time, atomic output, and the written file held against its plan.

Nothing is decided here, and nothing of `models` is imported: values that come from a model are handed in by a provider.
"""
