"""`python -m openrlhf_alp.cli.train_ppo_ray`: OpenRLHF's PPO trainer with ALP and rollout services.

Takes every flag of `openrlhf.cli.train_ppo_ray` and adds those of `openrlhf_alp.learner.flags`.
"""

from __future__ import annotations

import sys

from openrlhf_alp.learner.launch import launch


def main() -> int:
    """Train; returns the exit status: 0 done, 1 failed while running, 2 wrong flags or set-up."""
    return launch()


if __name__ == "__main__":
    sys.exit(main())
