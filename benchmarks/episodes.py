"""Do tools and generation overlap? Whole tool-integrated episodes against each resource alone.

    python benchmarks/episodes.py [--episodes 64] [--repetitions 3]

Both services run for real: the deterministic engine serves a tiny model that reproduces an episode
of three tool turns from memory, the tool service runs its code in the sandbox. The engine runs a
part of the episodes at a time and takes a fixed time per step, as a GPU does, without using the
CPU. The same episodes are played three times in one run: with both, with the tool's answers known
in advance (generation alone), and their programs alone (tools alone). If nothing waited for
anything else, the whole would take as long as the slower of the two.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

from common.serving import serving
from policies.tiny_policy import EOS, save_tiny_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.episodes.observation import CodeResult, CodeStatus, plain_template
from openrlhf_alp.episodes.protocols import Interpreter, Task
from openrlhf_alp.episodes.records import Episode, SamplingConfig
from openrlhf_alp.episodes.runners import ToolIntegrated, ToolIntegratedConfig
from openrlhf_alp.rewards.protocol import RewardResult
from openrlhf_alp.rollouts.interpreter import StatelessInterpreter
from openrlhf_alp.rollouts.runners import ServiceGenerate
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

KEY = "benchmark-key"
GOAL = 1.15
PROMPT = "Task\n"
PROGRAMS = ("print(1)\n", "print(2)\n", "print(3)\n")
TIMEOUT_S = 60.0
ENGINE = ("--engine", "hf", "--max-num-seqs", "8", "--faults.step-s", "0.02")


class KnownAnswers:
    """The interpreter of "generation alone": it knows what each program prints."""

    async def run(self, code: str) -> CodeResult:
        return CodeResult(status=CodeStatus.OK, stdout=code[len("print(")] + "\n")

    async def close(self) -> None: ...


class NoReward:
    """Scoring is measured elsewhere."""

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        return RewardResult(value=0.0)


def dialogue() -> tuple[str, str]:
    turns = "".join(
        f"```python\n{code}```\n```output\n{number}\n```\n"
        for number, code in enumerate(PROGRAMS, start=1)
    )
    return PROMPT, f"{turns}\\boxed{{3}}{EOS}"


@contextlib.contextmanager
def service(module: str, *flags: str) -> Iterator[str]:
    """`python -m MODULE` on a free port; yields its URL."""
    keys = dict.fromkeys((API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE), KEY)
    command = ("-m", module, "--port", "0", "--log-level", "WARNING", *flags)
    # One core for the engine, one for the tools: a GPU would not take the tools' core either.
    with serving(*command, **keys, OMP_NUM_THREADS="1") as (url, _):
        yield url


class Stage:
    """Plays episodes over the running services."""

    def __init__(
        self, rollouts: RolloutClient, tools: ToolClient, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._generate = ServiceGenerate(client=rollouts, deadline_s=600.0)
        self._tools = tools
        self._tokenizer = tokenizer

    async def episode(self, interpreter: Interpreter) -> Episode:
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        runner = ToolIntegrated(
            generate=self._generate,
            open_interpreter=lambda: interpreter,
            encode=encode,
            decode=partial(self._tokenizer.decode, skip_special_tokens=True),
            template=plain_template(self._tokenizer),
            reward=NoReward(),
            config=ToolIntegratedConfig(
                max_tokens_per_turn=None, max_tool_turns=5, max_output_chars=512
            ),
        )
        return await runner(
            request_id=uuid4().hex,
            task=Task(prompt=PROMPT, label="3", prompt_ids=encode(PROMPT)),
            # Greedy, so that the three runs do the same work.
            sampling=SamplingConfig(max_tokens=200, temperature=0.0),
        )

    async def both(self) -> None:
        episode = await self.episode(StatelessInterpreter(self._tools, timeout_s=TIMEOUT_S))
        assert [call.status for call in episode.tool_calls] == ["ok"] * len(PROGRAMS), episode

    async def generation_alone(self) -> None:
        episode = await self.episode(KnownAnswers())
        assert len(episode.tool_calls) == len(PROGRAMS), episode

    async def tools_alone(self) -> None:
        interpreter = StatelessInterpreter(self._tools, timeout_s=TIMEOUT_S)
        for program in PROGRAMS:
            assert (await interpreter.run(program)).status is CodeStatus.OK


async def seconds_for(play: Callable[[], Awaitable[None]], num_episodes: int) -> float:
    started_s = time.perf_counter()
    await asyncio.gather(*(play() for _ in range(num_episodes)))
    return time.perf_counter() - started_s


async def measure(
    rollout_url: str, tool_url: str, model: Path, *, num_episodes: int, repetitions: int
) -> None:
    async with (
        RolloutClient([rollout_url], api_key=KEY) as rollouts,
        ToolClient([tool_url], api_key=KEY) as tools,
    ):
        stage = Stage(rollouts, tools, AutoTokenizer.from_pretrained(model))
        await stage.both()  # connections, first slots, first forward
        ratios = []
        for number in range(1, repetitions + 1):
            generation_s = await seconds_for(stage.generation_alone, num_episodes)
            tools_s = await seconds_for(stage.tools_alone, num_episodes)
            both_s = await seconds_for(stage.both, num_episodes)
            ratios.append(both_s / max(generation_s, tools_s))
            print(
                f"{number}: generation alone {generation_s:.2f} s, tools alone {tools_s:.2f} s, "
                f"both {both_s:.2f} s: {ratios[-1]:.2f} of the slower, "
                f"{both_s / (generation_s + tools_s):.2f} of their sum",
                flush=True,
            )
    ratio = statistics.median(ratios)
    verdict = "ok  " if ratio <= GOAL else "MISS"
    print(
        f"{verdict} {num_episodes} episodes of {len(PROGRAMS)} tool turns / slower resource alone: "
        f"{ratio:.2f} (goal <= {GOAL}), load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = save_tiny_policy(Path(name) / "model", [dialogue()])
        tool_flags = ("--presets", "numpy", "--slots", "1", "--max-queue", "4096")
        with (
            service("services.rollout", "--model", str(model), *ENGINE) as rollout,
            service("services.tool", *tool_flags) as tool,
        ):
            asyncio.run(
                measure(
                    rollout,
                    tool,
                    model,
                    num_episodes=arguments.episodes,
                    repetitions=arguments.repetitions,
                )
            )


if __name__ == "__main__":
    main()
