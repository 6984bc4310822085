"""`openrlhf-alp report`: any number of runs on one page.

folders --read_runs--> Run --group--> cells (method x condition) --+--> measures: the table
                                                                   +--> charts --> page, pictures
"""
