"""Plays one answer to one problem: the episodes of training, with a seed of their own each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.data.templates import TEMPLATES, prompt_text
from openrlhf_alp.episodes.protocols import Generate, Task
from openrlhf_alp.episodes.records import Completion, SamplingConfig
from openrlhf_alp.evaluate.records import Answer
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem, SuiteError
from openrlhf_alp.rewards.protocol import RewardResult
from openrlhf_alp.rollouts.runners import ToolConfig, build_runner

_SEED_BYTES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How every problem of a run is asked and answered."""

    template: str
    """A name of `data.templates.TEMPLATES`."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    """Budget of an episode after its prompt, program output included."""

    seed: int
    """Every answer has its own seed, made from this one, the problem and its number: it does not
    depend on the server that samples it, nor on what ran before."""

    tool: ToolConfig | None = None
    """Settings of tool-integrated episodes; None: one turn."""

    def sampling(self, *, max_tokens: int) -> SamplingConfig:
        """The sampling of an episode, without its seed."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=max_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """What two runs must share to be one run. URLs may change between two starts of a run."""
        fields = dataclasses.asdict(self)
        if self.tool is not None:
            for name in ("urls", "request_timeout_s"):
                fields["tool"].pop(name)
        return fields


def check_template(plan: Plan, tokenizer: Any, *, named: str) -> None:
    """Checks that the tokenizer can write the messages of the plan's template.

    Args:
        named: the flag and value that gave the tokenizer, for messages.

    Raises:
        TokenizerError: it has no chat template, or one that refuses them.
    """
    prompt_text(TEMPLATES[plan.template].render("1 + 1"), tokenizer, named=named)


class Prompts:
    """The problems of a suite as tasks of a policy.

    Args:
        named: the flag and value that gave the tokenizer, for messages.
        max_length: the service's limit of prompt and answer together.

    Attributes:
        num_cut: problems to which `max_length` leaves less than the plan's budget.

    Raises:
        TokenizerError: the tokenizer has no chat template for the plan's template.
        SuiteError: a prompt leaves no room for an answer.
    """

    def __init__(
        self, loaded: LoadedSuite, plan: Plan, tokenizer: Any, *, named: str, max_length: int
    ) -> None:
        self._tasks: dict[str, tuple[Task, int]] = {}
        template = TEMPLATES[plan.template]
        for problem in loaded.problems:
            text = prompt_text(template.render(problem.text), tokenizer, named=named)
            task = Task.tokenized(prompt=text, label=problem.label, tokenizer=tokenizer)
            room = task.budget(max_length=max_length, max_tokens=plan.max_new_tokens)
            if room < 1:
                raise SuiteError(
                    f"{loaded.name}, problem {problem.id}: its prompt of {len(task.prompt_ids)} "
                    f"tokens leaves no room below the service's max_model_len {max_length}. Fix: "
                    "raise --max_model_len, which is --max-model-len of a service of your own, or "
                    "ask another policy where its model has no more"
                )
            self._tasks[problem.id] = task, room
        self.num_cut = sum(room < plan.max_new_tokens for _, room in self._tasks.values())

    def task(self, problem: Problem) -> tuple[Task, int]:
        """The task, and the number of tokens that may follow its prompt."""
        return self._tasks[problem.id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Plays answers over the services."""

    run_id: str
    """Part of request ids, so that a server's stored reply of another run is never taken."""

    plan: Plan
    generate: Generate
    tokenizer: Any
    tool_client: ToolClient | None = None

    async def play(self, suite: str, problem: Problem, sample: int, prompts: Prompts) -> Answer:
        """One answer; the same arguments give the same request ids and seeds.

        Raises:
            EpisodeError, ServiceError: see `episodes.protocols.EpisodeRunner`.
        """
        name = f"{suite}/{problem.id}/{sample}"
        heard = _Heard()
        runner = build_runner(
            generate=_Seeded(generate=self.generate, name=f"{self.plan.seed}/{name}"),
            reward=heard,
            tokenizer=self.tokenizer,
            tool=self.plan.tool,
            client=self.tool_client,
        )
        task, max_tokens = prompts.task(problem)
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        episode = await runner(
            request_id=f"eval-{self.run_id}-{digest}",
            task=task,
            sampling=self.plan.sampling(max_tokens=max_tokens),
        )
        return Answer.of(episode, problem_id=problem.id, sample=sample, response=heard.response)


class _Heard:
    """Stands where the reward stands and keeps what it is asked about.

    The answer is graded after it is stored: a reward that fails here would cost the answer.
    """

    response = ""

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        self.response = response
        return RewardResult(value=0.0)


@dataclass(slots=True, kw_only=True)
class _Seeded:
    """Gives each request of an episode a seed that follows from the episode's name."""

    generate: Generate
    name: str
    num_requests: int = 0

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        # Two turns with one seed would be drawn with the same random numbers.
        name = f"{self.name}/{self.num_requests}"
        self.num_requests += 1
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:_SEED_BYTES])
        return await self.generate(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=dataclasses.replace(sampling, seed=seed),
        )
