"""Perplexity of a text: what one run computes (`job`), the run (`evaluation`), rank 0's part (`recorder`), many runs on
one deployment (`sweep`), and what a person sees meanwhile (`progress`, `tracking`).
"""
