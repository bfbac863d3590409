"""What a model says about its own tokens, heads and layers, by passes with gradients: relevance, layers compared, and
the calibration of the transform codec.
"""
