"""Models that are spread over ranks: which part is whose, its values straight from files, and what all ranks have to agree on."""
