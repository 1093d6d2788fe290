"""What a plan has to know of the loading code of modules and libraries: versions, computed values, and conversions of names."""
