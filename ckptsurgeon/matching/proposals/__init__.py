"""From links to what a person is shown: rules that were replayed, what is uncertain, and what is left over."""
