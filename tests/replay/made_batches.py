"""Batches by hand, and a tiny model that samples real ones."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_alp.episodes.records import ToolCall, Turn, TurnKind, VersionSpan
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import BatchInfo

VOCABULARY = 40


def sample(number: int = 0, **fields: object) -> RecordedSample:
    """Two prompt tokens, two sampled, one of a tool, one sampled."""
    return RecordedSample(
        **{
            "token_ids": np.array([5, 6, 7, 8, 9, 10], dtype=np.int32),
            "rollout_log_probs": np.array([0, 0, -0.5, -1.25, 0, -2], dtype=np.float32),
            "action_ranges": ((2, 4), (5, 6)),
            "advantages": np.array([0, 0, 1, 1, 0, 1], dtype=np.float32),
            "sample": number,
            "group": str(number // 2),
            "reward": 1.0,
            "reward_detail": {"parsed": 1.0},
            "request_id": f"request-{number}",
            "prompt": "2 + 2 =",
            "label": "4",
            "stop_reason": "eos",
            "spans": (
                VersionSpan(version=3, digest="a" * 64, start=2, end=4),
                VersionSpan(version=4, digest="b" * 64, start=5, end=6),
            ),
            "turns": (
                Turn(kind=TurnKind.PROMPT, start=0, end=2, text="2 + 2 ="),
                Turn(kind=TurnKind.ACTION, start=2, end=4, text="code", finish_reason="stop"),
                Turn(kind=TurnKind.OBSERVATION, start=4, end=5, text="4"),
                Turn(kind=TurnKind.ACTION, start=5, end=6, text="so 4", finish_reason="stop"),
            ),
            "tool_calls": (
                ToolCall(code="print(2 + 2)", status="ok", total_s=0.5, run_s=0.25, output="4"),
            ),
            **fields,
        }
    )


def batch(*samples: RecordedSample, **info: object) -> RecordedBatch:
    fields = {"package_version": "0", "step": 1, "policy_version": 4, **info}
    return RecordedBatch(info=BatchInfo(**fields), samples=samples or (sample(),))


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random 3-layer Llama in float32 with a peaked output, so that some tokens are rare."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@torch.no_grad()
def sampled_batch(
    model: LlamaForCausalLM, *, num_samples: int = 8, dtype: torch.dtype = torch.bfloat16
) -> RecordedBatch:
    """Answers of `model` in `dtype`, which is the rollout engine's rounding; rewards by hand."""
    served = tiny_llama()
    served.load_state_dict(model.state_dict())
    served.to(dtype)
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(num_samples):
        ids = [1, 2 + number // 4, 3]
        log_probs = [0.0] * 3
        for _ in range(5 + number % 3):
            logits = served(torch.tensor([ids])).logits[0, -1].float()
            every = torch.log_softmax(logits, -1)
            token = int(torch.multinomial(every.exp(), 1, generator=generator))
            ids.append(token)
            log_probs.append(float(every[token]))
        samples.append(
            RecordedSample(
                token_ids=np.array(ids, dtype=np.int32),
                rollout_log_probs=np.array(log_probs, dtype=np.float32),
                action_ranges=((3, len(ids)),),
                sample=number,
                group=str(number // 4),
                reward=float(number % 2),
                spans=(VersionSpan(version=1, digest="", start=3, end=len(ids)),),
            )
        )
    return RecordedBatch(info=BatchInfo(step=1, policy_version=1), samples=tuple(samples))
