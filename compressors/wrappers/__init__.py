"""Codecs around another codec: a rotation in front, channels or tokens taken apart, entropy coding behind."""
