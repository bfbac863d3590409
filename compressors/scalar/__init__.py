"""Codecs that quantise or cast values as they stand, each row or block with side information of its own."""
