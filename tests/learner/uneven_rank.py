"""One rank of a learner that gets a full, a short and a full batch. Started by test_batches.py.

python uneven_rank.py RANK PORT ARGS.pickle REPORT.json
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import torch
from openrlhf.trainer.ppo_utils.experience import make_experience_batch, split_experience_batch
from test_actor import rollouts

from openrlhf_alp.learner import seams
from openrlhf_alp.learner.actor import AlpPolicyModelActor
from openrlhf_alp.learner.batches import BatchShape, fitting_part


def main(rank: int, port: int, args_file: Path, report: Path) -> None:
    from openrlhf.utils import get_strategy

    torch.set_num_threads(1)
    args = pickle.loads(args_file.read_bytes())
    actor = AlpPolicyModelActor(2, rank, "127.0.0.1", port)
    with seams.installed():
        strategy = get_strategy(args)
    actor.init_model_from_pretrained(strategy, args.actor.model_name_or_path, 10, None)
    shape = BatchShape.of(args)
    updates, own_tokens, logged_tokens = [], [], []
    for number, num_samples in enumerate((8, 6, 8)):
        samples = split_experience_batch(rollouts(actor, num_samples=num_samples, seed=number))
        fit = shape.fit(num_samples)
        kept = fitting_part(samples, fit, group_size=shape.group_size, seed=number)
        own = len(kept) // 2
        batch = make_experience_batch(kept[rank * own : (rank + 1) * own])
        own_tokens.append(int(batch.action_mask.sum()))
        actor.append(batch)
        logged_tokens.append(actor.fit().get("alp/num_tokens"))
        updates.append(actor.trainer.update_number)
    figures = {"updates": updates, "own_tokens": own_tokens, "logged_tokens": logged_tokens}
    report.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
