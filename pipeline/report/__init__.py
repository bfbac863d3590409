"""From records to what a reader sees: tables, figures and the page. Reads records and per-token files only; importing
it does not load torch.
"""
