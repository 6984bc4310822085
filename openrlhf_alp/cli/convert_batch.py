"""`openrlhf-alp convert-batch`: its options. `replay/convert.py` does the work."""

import argparse
import importlib.metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape

HELP = "turn JSON lines of another trainer into a batch file for replay"

DESCRIPTION = """\
Turn a batch of another trainer or engine into the Parquet file that `openrlhf-alp replay` reads.

Each line of the input is one sample, a JSON object with these fields:

  prompt_ids, response_ids   token ids, as the engine saw them; or
  token_ids, action_ranges   all ids, and [start, end) of what the policy sampled
                             (action_mask, one true or false a token, also serves)
  rollout_log_probs          one number for each sampled token, or for each token
  group, reward              samples of one prompt share the group; or
  advantages                 one number, or one for each token

Optional: sample (its number), prompt, label, stop_reason, reward_detail, truncated, void.
The log-probs must be those of the distribution that the token was drawn from.

  openrlhf-alp convert-batch samples.jsonl batch.parquet --model /models/policy
  openrlhf-alp replay batch.parquet --model /models/policy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp convert-batch`."""
    add = parser.add_argument
    add("input", type=Path, help="JSON lines, one sample each")
    add("output", type=Path, help="the file to write, ending in .parquet")
    add("--model", default="", help="folder or id of the model that sampled (kept in the file)")
    add("--temperature", type=float, default=1.0, help="it was sampled with (default: 1)")
    add("--step", type=int, default=0, help="training step of the batch (default: unknown)")
    add("--overwrite", action="store_true", help="replace the output if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Converts; returns 0, or 2 when the input is faulty or the output cannot be written."""
    # Here and not above: Arrow takes a moment to import, and --help does not need it.
    from openrlhf_alp.replay.files.convert import read_json_lines
    from openrlhf_alp.replay.files.schema import SUFFIX, BatchInfo
    from openrlhf_alp.replay.files.write import write_batch

    console = Console()
    output: Path = arguments.output
    try:
        if output.suffix != SUFFIX:
            raise ValueError(f"{output} must end in {SUFFIX}, by which replay finds batches")
        if output.exists() and not arguments.overwrite:
            raise ValueError(f"{output} exists; give --overwrite to replace it")
        if not arguments.temperature > 0:
            raise ValueError(f"--temperature {arguments.temperature} must be above 0")
        info = BatchInfo(
            package_version=importlib.metadata.version("openrlhf-alp"),
            step=arguments.step,
            model=arguments.model,
            sampling={"temperature": arguments.temperature},
        )
        batch = read_json_lines(arguments.input, info)
        write_batch(batch, output)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]Nothing was written.[/] {escape(str(error))}", soft_wrap=True)
        return 2
    console.print(
        f"{escape(str(output))}: {len(batch.samples)} samples, {batch.num_action_tokens} action "
        "tokens",
        soft_wrap=True,
    )
    return 0
