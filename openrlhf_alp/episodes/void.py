"""Which of the policy's tokens enter the loss when a turn was void.

A void turn neither calls a tool nor gives a final answer (paper, appendix E). Training on it
rewards or blames tokens that led nowhere, which is what blows up multi-turn runs. What is left out
is left out of everything: the ratio, the loss and its normaliser. The episode's reward still counts
in its group's baseline, unless `--tir.void_baseline drop` is given.
"""

from typing import Literal

from openrlhf_alp.episodes.records import Episode, TurnKind

VoidPolicy = Literal["trajectory", "turn", "off"]
"""Leave out the whole episode (the authors' code), the void turn only, or nothing."""


def trained_ranges(episode: Episode, policy: VoidPolicy) -> list[tuple[int, int]]:
    """Half-open (start, end) on the episode's axis of the turns that are trained on.

    Empty for a void episode under `trajectory`.
    """
    if policy == "trajectory" and episode.void:
        return []
    return [
        (turn.start, turn.end)
        for turn in episode.turns
        if turn.kind is TurnKind.ACTION and not (policy == "turn" and turn.void)
    ]
