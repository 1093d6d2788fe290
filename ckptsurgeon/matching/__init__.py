"""Which tensors of one implementation are which of another, with evidence and margins. Pure: headers in, links out."""
