"""The prefix between a source's names and a target's: found, doubted where a rival is near, offered where it would be exchanged."""
