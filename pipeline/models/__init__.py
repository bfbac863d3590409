"""A checkpoint cut into stages: finding and staging its files, converting GGUF, loading one stage's tensors, and what a
stage computes. The only room that knows transformers' insides.
"""
