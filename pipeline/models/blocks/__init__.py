"""Matrices kept as GGUF's blocks of few bits, and products with them."""
