"""Values to text and to JSON. Nothing here opens, decides, prints or exits."""
