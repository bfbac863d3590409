"""Which tokens of a frame matter, for codecs that ask: metrics computed while a micro-batch passes, files made
beforehand, and which metric each link gets.
"""
