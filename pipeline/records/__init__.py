"""What a run leaves on disk: records (`run_record`, `generation_record`, `failed_point`; read and written by `store`),
the journal of a run that has not ended (`journal`), the sums in them (`traffic`, `perplexity`). Never loads torch.
"""
