"""From links between keys to a person's rules: few, general, commented, and replayed until they give exactly the links. Pure."""
