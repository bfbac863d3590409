"""What a run leaves on disk: the record and its per-token file (`store`, `schema`), the journal of a run that has not
ended (`journal`), and the sums that stand in them (`traffic`, `perplexity`). Plain Python.
"""
