"""The rollout service as an episode's `Generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.episodes.records import Completion, SamplingConfig, VersionSpan
from services.rollout.wire.schemas import GenerateRequest, Sampling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServiceGenerate:
    """Samples over HTTP; a lost server is replaced by another within `deadline_s`."""

    client: RolloutClient
    deadline_s: float
    """Of one request, on the server; then its slot is free again."""

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        """See `episodes.protocols.Generate`.

        Raises:
            ServiceError: the services cannot be reached or refuse the request.
        """
        reply = await self.client.generate(
            GenerateRequest(
                request_id=request_id,
                token_ids=list(prompt_ids),
                # Field by field: the records are those of an episode, the schema that of the wire.
                sampling=Sampling(**dataclasses.asdict(sampling)),
                deadline_s=self.deadline_s,
            )
        )
        sample = reply.samples[0]
        return Completion(
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            spans=tuple(
                VersionSpan(version=s.version, digest=s.digest, start=s.start, end=s.end)
                for s in sample.spans
            ),
        )
