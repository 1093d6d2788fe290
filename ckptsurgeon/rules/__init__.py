"""What a person writes: patterns and rules, read from arguments and TOML, and turned round. Pure."""

AUTO = ("safe",)  # what may be applied unasked
