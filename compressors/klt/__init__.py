"""The calibrated transform codec: `codec` (entropy coded), `fixed` (fixed size), the calibration file that both read,
and what fits one (`fit`, `models`).
"""
