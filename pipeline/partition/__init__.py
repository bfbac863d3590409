"""Which layers lie on which node, and who does what in which order: plans and schedules. Integers only, nothing of what
a layer is. Plain Python.
"""
