"""A target as a model: found, imported, built, and read as names and shapes, every parameter with all its names."""
