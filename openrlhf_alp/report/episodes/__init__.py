"""`openrlhf-alp episodes`: recorded batches as pages that show every token.

batch --+--> ratios: log pi_sigma / pi and log pi / mu of every action (with a model)
        +--> texts: what each id says (with a tokenizer)
        +--> page: one HTML file per step        +--> inspect_log: an Inspect log per step
"""
