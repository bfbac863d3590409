"""Which layers lie on which node, what goes around them at once, and how much of it may: plans and passes. Integers
only, nothing of what a layer is. Plain Python.
"""
