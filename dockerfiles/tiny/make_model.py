"""Write a policy of two layers that calls its tool, and prompts for it, into the current folder.

It needs `benchmarks/policies` on its path. `make docker-test` runs it in the learner's image.
"""

import json
from pathlib import Path

import torch
from tiny_policy import save_tiny_policy

NUM_TASKS = 4
# As the chat template writes it: what a program printed comes as a turn of the user.
CALL = "```python\nprint({0})\n```\n\nuser: ```output\n{0}\n```\nassistant: \\boxed{{{1}}}<eos>"

tasks = [f"Task {number}" for number in range(NUM_TASKS)]
with Path("prompts.jsonl").open("w") as prompts:
    for number, task in enumerate(tasks):
        prompts.write(json.dumps({"input": task, "label": str(number)}) + "\n")
# Every second answer is wrong: a group whose answers get the same reward has no gradient.
dialogues = [
    (f"user: {task}\nassistant: ", CALL.format(number, answer))
    for number, task in enumerate(tasks)
    for answer in (number, number + 1)
]
save_tiny_policy(Path("model"), dialogues, dtype=torch.bfloat16, good_loss=0.03)
