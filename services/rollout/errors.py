"""What the core raises, and the one table from it to HTTP.

    RolloutError
        LedgerError      ledger.py                         one request id, or the service's capacity
        GenerateError    generator.py                      one generate request
        WeightsError     weights/                          one weight update, an upload, sleep
        TransferError    engines/protocol.py, gpu_transfer/   one transfer from the learner's GPU

An error names its cause by a stable `code` and in one sentence. Status, fix and Retry-After stand
in `ANSWERS` only, so the core can be read and tested without HTTP.
"""

from dataclasses import dataclass

from services.common.errors import ApiError
from services.rollout.wire.schemas import MIN_SAMPLED_TEMPERATURE


class RolloutError(Exception):
    """An error of the core that the caller or the operator can act on.

    Args:
        code: a key of `ANSWERS`.
        message: the cause, one whole sentence.
        field: dotted name of the wrong request field; None: the one in `ANSWERS`, if any.
        values: what the fix in `ANSWERS` names in braces.
    """

    def __init__(self, code: str, message: str, *, field: str | None = None, **values: int) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
        self.values = values


@dataclass(frozen=True, slots=True)
class Answer:
    """What HTTP says of one code."""

    status: int
    fix: str
    field: str | None = None
    retry_after: str | None = None  # seconds
    code: str | None = None  # on the wire; None: the key in the table


_RESEND = "Write whole files with exactly the names, shapes and dtypes of GET /v1/weights."
_TOKENISE = "Tokenise with the served model's tokenizer."
_FULL_UPDATE = "Send every tensor and leave base_version out."

ANSWERS = {
    # One request id, and capacity.
    "request_id_reused": Answer(
        409, "Use a new id for a new request, and the same body for a retry.", "request_id"
    ),
    "request_unknown": Answer(404, "Send it again with POST /v1/generate.", "request_id"),
    "request_cancelled": Answer(410, "Send it again if it is still wanted; the id is free."),
    "too_many_samples": Answer(
        422, "Ask for fewer samples per request, or raise --max-pending-samples.", "n"
    ),
    "overloaded": Answer(
        429,
        "Try again in {retry_after_s} s or on another server.",
        retry_after="{retry_after_s}",
    ),
    # One generate request.
    "prompt_too_long": Answer(
        422, "Shorten the prompt, or start the service with a larger --max-model-len.", "token_ids"
    ),
    "max_tokens_too_large": Answer(
        422,
        "Ask for what fits: a sample cut short by the context would pass for a long answer.",
        "sampling.max_tokens",
    ),
    "token_out_of_range": Answer(422, _TOKENISE, "token_ids"),
    "stop_token_out_of_range": Answer(
        422, _TOKENISE, "sampling.stop_token_ids", code="token_out_of_range"
    ),
    "temperature_too_low": Answer(
        422,
        f"Use 0 for greedy sampling, or at least {MIN_SAMPLED_TEMPERATURE}.",
        "sampling.temperature",
    ),
    "min_above_max": Answer(422, "Lower min_tokens or raise max_tokens.", "sampling.min_tokens"),
    "refused_by_engine": Answer(422, "Correct the request as the message says.", "body"),
    "deadline_exceeded": Answer(
        504, "Allow more time, ask for fewer tokens, or add a server.", "deadline_s"
    ),
    "invalid_logprobs": Answer(
        500, "Check the last weight update for NaN; the sample must not be trained on."
    ),
    "engine_dead": Answer(503, "Use another server; the operator has to restart this one."),
    # Whether the weights may be used.
    "sleeping": Answer(
        503, "Use another server, or POST /v1/wake_up with the admin key.", retry_after="1"
    ),
    "weights_failed": Answer(503, "Use another server until this one has had a full update."),
    "must_be_awake": Answer(409, "POST /v1/wake_up first.", code="sleeping"),
    "no_sleep_mode": Answer(501, "Start it on a GPU with --sleep-mode, or use /v1/pause."),
    "wake_up_failed": Answer(503, "Restart this service; see its log."),
    # One weight update.
    "update_in_progress": Answer(
        409, "Wait for it to return; GET /v1/weights shows the state.", retry_after="1"
    ),
    "stale_version": Answer(
        409, "Use version {next_version} or more; GET /v1/weights shows it.", "version"
    ),
    "full_update_required": Answer(409, _FULL_UPDATE, "base_version"),
    "base_version_mismatch": Answer(
        409, "Send every tensor, or the changes against the serving version.", "base_version"
    ),
    "not_prepared": Answer(
        409, "Call /v1/weights/prepare first and commit exactly what it staged.", "version"
    ),
    "weight_update_failed": Answer(
        503, "See GET /v1/weights for the state, then prepare and commit again."
    ),
    "cannot_stage": Answer(
        507, "Free space or inodes in weights_dir, or check its permissions.", "files"
    ),
    "digest_mismatch": Answer(
        422, "Write the files again; they changed or were cut short on the way.", "digest"
    ),
    "weight_file_missing": Answer(
        422, "Write the file before prepare, in a folder that both sides share.", "files"
    ),
    "path_outside_weights_dir": Answer(
        422, "Use names relative to the contract's weights_dir, without '..'.", "files"
    ),
    "bad_weight_file": Answer(422, _RESEND, "files"),
    "unknown_tensors": Answer(422, _RESEND, "files"),
    "missing_tensors": Answer(422, _RESEND, "files"),
    "shape_mismatch": Answer(422, _RESEND, "files"),
    "dtype_mismatch": Answer(422, _RESEND, "files"),
    # An upload.
    "wrong_offset": Answer(
        409, "Ask for the size with GET and continue from there, or start again at 0.", "offset"
    ),
    "upload_too_large": Answer(
        413, "Send the weights of the served model only, in its dtype.", "body"
    ),
    "cannot_store": Answer(507, "Free space in weights_dir."),
    # A transfer from the learner's GPU.
    "no_link": Answer(
        409, "POST /v1/weights/transfer/open first; after a failed transfer, again."
    ),
    "wrong_handles": Answer(
        422, "Send what fits the link that is open, or open another one.", "tensors"
    ),
    "transport_unavailable": Answer(
        501,
        "Use the transport file or http: nccl and ipc need the vLLM engine on CUDA, and ipc a "
        "tensor_parallel_size of 1.",
        "link.backend",
    ),
    "ranks_do_not_fit": Answer(
        422, "Count num_workers of every server's contract, and 1 for the learner.",
        "link.world_size",
    ),
    "transfer_timeout": Answer(
        504,
        "Open a new link; learner and servers have to reach each other and send at the same time.",
    ),
    "foreign_gpu": Answer(
        422, "Put learner and server on one GPU, or use the transport nccl or http.",
        "link.gpu_uuid",
    ),
    "transfer_failed": Answer(
        503, "See this service's log; open a new link, or use the transport http."
    ),
}  # fmt: skip


def to_api_error(error: RolloutError) -> ApiError:
    """What a caller sees of an error of the core."""
    answer = ANSWERS[error.code]
    headers = {}
    if answer.retry_after is not None:
        headers["Retry-After"] = answer.retry_after.format(**error.values)
    return ApiError(
        answer.status,
        answer.code or error.code,
        str(error),
        fix=answer.fix.format(**error.values),
        field=error.field or answer.field,
        headers=headers,
    )
