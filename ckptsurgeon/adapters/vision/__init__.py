"""Adapters of vision models: position embeddings, bias tables, patch embeddings and convolutions of another size.

A size is inferred from the shapes only where one fits; otherwise the rule has to give it. Sizes are height before width. Values are
computed in float32 or wider and returned in their own dtype.
"""
