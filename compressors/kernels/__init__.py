"""Compiled CPU loops of the codecs (numba): one thread, GIL released, cached on disk, IEEE arithmetic
throughout.

A kernel writes exactly the bytes or floats of the torch operations it stands in for; fast-math and fused
multiply-add are off. Codecs import these modules on first use, because numba takes a second to load.
"""
