"""Thinwire's runner: one causal LM over several ranks, hidden states crossing as packed frames."""
