"""A checkpoint cut into stages: finding and staging its files, converting GGUF, loading one stage's tensors, what a
stage computes, and which token follows. The only room that knows transformers' insides.
"""
