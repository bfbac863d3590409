"""What codec and kernels of hqq share. Apart from the kernels, whose import loads Numba."""

GROUP = 64
ITERATIONS = 20
PATIENCE = 3
BETA = 10.0
# float bits are 2^23 (log2 + 127) to first order, so bits -> POWER_OFFSET - 0.3 bits takes a power of -0.3
POWER = -0.3
POWER_OFFSET = (1 - POWER) * (127 - 0.045) * 2**23
