"""What a user writes: patterns and rules, read from arguments and TOML, and reversed. Pure."""

AUTO = ("safe",)  # values of --auto
