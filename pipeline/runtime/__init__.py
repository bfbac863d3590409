"""A model deployed over the ranks, and the loops that drive it: what is decided and loaded once per start
(`deployment`), one rank's actions (`runner`, `gradients`), one-token times, and the start and end of a program on all
ranks (`launch`).
"""
