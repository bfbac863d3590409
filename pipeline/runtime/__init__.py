"""A model deployed over the ranks, and the loops that drive it: what is decided and loaded once per start
(`deployment`), the loop that every rank runs (`engine`) and what it computes (`worker`, `head`, `gradients`), one-token
times, and the start and end of a program on all ranks (`launch`).
"""
