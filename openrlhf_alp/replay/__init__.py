"""Recorded batches: write them, read them back, put one through every method, explain a mismatch.

    training --learner/telemetry/recording.py--> files/write.py --> step-000001.parquet
    anywhere --JSON lines--> files/convert.py --------------------^
                                                                  | files/read.py, pick.py
                                     learner.py, tensors.py  <----+
                                        |               |
                            bench/: every method    explain/: where they differ, and why

Nothing here imports OpenRLHF or Ray, so a batch of another trainer can be replayed in one process,
on a CPU or a GPU.
"""
