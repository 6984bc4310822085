"""A batch for `openrlhf-alp replay` from plain transformers sampling, without this package.

Any trainer can write such a file: one row per sample, the columns of docs/replay.md. Here a model
answers small sums, eight times each; the reward is 1 when the last number of the answer is right.

    python examples/batch_from_transformers.py --model DIR --output batch.parquet
    openrlhf-alp replay batch.parquet --model DIR
"""

import argparse
import re

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [(a, b) for a, b in ((2, 3), (4, 1), (7, 2), (5, 5), (3, 6), (8, 1), (6, 4), (9, 2))]


@torch.no_grad()
def sample(
    model: torch.nn.Module, prompt_ids: list[int], options: argparse.Namespace
) -> list[dict]:
    """Answers to one prompt, each with the log-prob of every sampled token."""
    prompts = torch.tensor([prompt_ids] * options.samples, device=model.device)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=options.max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # The distribution that the tokens were drawn from: with a temperature, divide by it here too.
    every = torch.stack(output.logits, 1).float().log_softmax(-1)
    drawn = output.sequences[:, len(prompt_ids) :]
    log_probs = every.gather(-1, drawn[..., None]).squeeze(-1)
    ends = set(torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist())
    rows = []
    for ids, values in zip(drawn.tolist(), log_probs.tolist(), strict=True):
        # The end of sequence is an action; what generate() pads behind it is not.
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        start = len(prompt_ids)
        rows.append(
            {
                "token_ids": prompt_ids + ids[:length],
                "rollout_log_probs": [0.0] * start + values[:length],
                "action_ranges": [{"start": start, "end": start + length}],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--output", required=True, help="the file to write, ending in .parquet")
    parser.add_argument("--samples", type=int, default=8, help="answers to each question")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--max-new-tokens", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # In the engine's dtype, not the learner's: their difference is what a replay is about.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    rows = []
    for group, (a, b) in enumerate(QUESTIONS[: options.questions]):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {a} + {b}?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in sample(model, tokenizer.encode(prompt, add_special_tokens=False), options):
            start = row["action_ranges"][0]["start"]
            answer = tokenizer.decode(row["token_ids"][start:], skip_special_tokens=True)
            numbers = re.findall(r"\d+", answer)
            right = bool(numbers) and int(numbers[-1]) == a + b
            rows.append({**row, "group": str(group), "reward": float(right), "prompt": prompt})
    pq.write_table(pa.Table.from_pylist(rows), options.output)
    mean = sum(row["reward"] for row in rows) / len(rows)
    print(f"{options.output}: {len(rows)} samples, mean reward {mean:.2f}")


if __name__ == "__main__":
    main()
