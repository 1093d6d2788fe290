"""What a person writes: patterns and rules, read from arguments and TOML, and turned round. Pure."""
