"""Entropy coding of `compressors.klt.codec`: what is sent of a frame, and with which model. docs/klt_format.md says it
byte for byte.

Everything that the models depend on is an integer: levels, classes, frequencies. Two machines whose floats differ in
the last bit still agree on every symbol. Tokens are coded independently of one another.

A level's index q in its quantiser (`kernels.trellis`) is coded with the model of its class and quantiser: as one of 63
symbols in the order 0, -1, 1, -2, 2, ..., anything larger as symbol 63 and 22 bits. The class is eight times the
logarithm to base 2 of the value's expected size in steps. Of a class above the last model, the low bits are sent as
they are and the rest with the last model. Expected sizes follow the token: with every stripe of LANES components, the
sum of its levels' sizes so far is compared with what the calibration expected, which scales the rest (`activity_of`).
So all components of a stripe know their classes at once, and each is the next of its own trellis and its own state of
the coder (`kernels.rans`).

Large frames are cut into blocks of whole tokens that share nothing. Small ones have one block and one state, which
begins at 1 and so costs next to nothing.
"""

from __future__ import annotations

from __future__ import annotations

from compressors.kernels.klt.classes import classify, count_symbols
from compressors.kernels.klt.frame import BLOCK_VALUES, decode, encode, num_blocks, num_states
from compressors.kernels.klt.models import (
    FIRST_CLASS,
    LAST_CLASS,
    LAST_WIDE_CLASS,
    NUM_CLASSES,
    NUM_SYMBOLS,
    Models,
    Symbols,
    make_models,
    static_classes,
)

__all__ = [
    "BLOCK_VALUES",
    "FIRST_CLASS",
    "LAST_CLASS",
    "LAST_WIDE_CLASS",
    "NUM_CLASSES",
    "NUM_SYMBOLS",
    "Models",
    "Symbols",
    "classify",
    "count_symbols",
    "decode",
    "encode",
    "make_models",
    "num_blocks",
    "num_states",
    "static_classes",
]
