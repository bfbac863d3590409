"""What a run leaves on disk: records and the per-token file (`store`), the journal of a run that has not ended (`journal`),
the sums that stand in them (`traffic`, `perplexity`), and how files are written (`files`). Plain Python.
"""
