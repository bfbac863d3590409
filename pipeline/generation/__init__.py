"""Prompts to tokens: requests, the scheduler that makes passes of them, text, and what a run of them leaves.
"""
