"""What the core raises, and what a caller sees of it.

    RolloutError
        LedgerError      ledger.py              the capacity of the service
        GenerateError    generator.py           a generate request
        WeightsError     weights/serving.py     a weight update, an upload, or sleep
        TransferError    engines/protocol.py    a transfer from the learner's GPU

An error has a stable code and a message. The HTTP status, field, fix and Retry-After of every code
stand in this table alone. What request ids stand for is checked for both services by
`common/idempotent.py`, which raises errors of its own.
"""

from services.common.errors import ErrorSpec, ErrorTable
from services.common.idempotent import (
    RequestCancelledError,
    RequestConflictError,
    RequestUnknownError,
)
from services.rollout.wire.schemas import MIN_SAMPLED_TEMPERATURE


class RolloutError(Exception):
    """An error that the caller or the operator can act on.

    Args:
        code: which row of the table applies.
        message: the cause. A final period is dropped, because the reply adds one.
        details: what the row names as `{error.details[...]}`.
    """

    def __init__(self, code: str, message: str, **details: object) -> None:
        super().__init__(message.removesuffix("."))
        self.code = code
        self.details = details


_RETRY_AFTER = "{error.details[retry_after_s]}"
_RESEND = "Write whole files with exactly the names, shapes and dtypes of GET /v1/weights."

# fmt: off
_ROWS: tuple[tuple[int, str, str | None, str] | tuple[int, str, str | None, str, str], ...] = (
    # status, code, field, fix, Retry-After in seconds

    # Request ids and capacity
    (409, "request_id_reused", "request_id",
     "Use a new id for a new request, and the same body for a retry."),
    (404, "request_unknown", "request_id", "Send it again with POST /v1/generate."),
    (410, "request_cancelled", None, "Send it again if it is still wanted; the id is free."),
    (422, "too_many_samples", "n",
     "Ask for fewer samples per request, or raise --max-pending-samples."),
    (429, "overloaded", None,
     f"Try again in {_RETRY_AFTER} s or on another server.", _RETRY_AFTER),

    # A generate request
    (422, "prompt_too_long", "token_ids",
     "Shorten the prompt, or start the service with a larger --max-model-len."),
    (422, "max_tokens_too_large", "sampling.max_tokens",
     "Ask for what fits: a sample cut short by the context would look like a long answer."),
    (422, "token_out_of_range", "{error.details[field]}",
     "Tokenise with the served model's tokenizer."),
    (422, "temperature_too_low", "sampling.temperature",
     f"Use 0 for greedy sampling, or at least {MIN_SAMPLED_TEMPERATURE}."),
    (422, "min_above_max", "sampling.min_tokens", "Lower min_tokens or raise max_tokens."),
    (422, "refused_by_engine", "body", "Correct the request as the message says."),
    (504, "deadline_exceeded", "deadline_s",
     "Allow more time, ask for fewer tokens, or add a server."),
    (500, "invalid_logprobs", None,
     "Check the last weight update for NaN; the sample must not be trained on."),
    (503, "engine_dead", None, "Use another server; the operator has to restart this one."),

    # Whether the weights may be used
    (503, "sleeping", None, "Use another server, or POST /v1/wake_up with the admin key.", "1"),
    (503, "weights_failed", None, "Use another server until this one has had a full update."),
    (501, "no_sleep_mode", None, "Start it on a GPU with --sleep-mode, or use /v1/pause."),
    (503, "wake_up_failed", None, "Restart this service; see its log."),

    # A weight update
    (409, "update_in_progress", None,
     "Wait for it to return; GET /v1/weights shows the state.", "1"),
    (409, "stale_version", "version",
     "Use version {error.details[next_version]} or more; GET /v1/weights shows it."),
    (409, "full_update_required", "base_version",
     "Send every tensor and leave base_version out."),
    (409, "base_version_mismatch", "base_version",
     "Send every tensor, or the changes against the serving version."),
    (409, "not_prepared", "version",
     "Call /v1/weights/prepare first and commit exactly what it staged."),
    (503, "weight_update_failed", None,
     "See GET /v1/weights for the state, then prepare and commit again."),
    (507, "cannot_stage", "files",
     "Free space or inodes in weights_dir, or check its permissions."),
    (422, "digest_mismatch", "digest",
     "Write the files again; they changed or were cut short on the way."),
    (422, "weight_file_missing", "files",
     "Write the file before prepare, in a folder that both sides share."),
    (422, "path_outside_weights_dir", "files",
     "Use names relative to the contract's weights_dir, without '..'."),
    (422, "bad_weight_file", "files", _RESEND),
    (422, "unknown_tensors", "files", _RESEND),
    (422, "missing_tensors", "files", _RESEND),
    (422, "shape_mismatch", "files", _RESEND),
    (422, "dtype_mismatch", "files", _RESEND),

    # An upload
    (409, "wrong_offset", "offset",
     "Ask for the size with GET and continue from there, or start again at 0."),
    (413, "upload_too_large", "body",
     "Send the weights of the served model only, in its dtype."),
    (507, "cannot_store", None, "Free space in weights_dir."),

    # A transfer from the learner's GPU
    (409, "no_link", None,
     "POST /v1/weights/transfer/open first; after a failed transfer, again."),
    (422, "wrong_handles", "tensors",
     "Send what fits the link that is open, or open another one."),
    (501, "transport_unavailable", "link.backend",
     "Use the transport file or http: nccl and ipc need the vLLM engine on CUDA, and ipc a "
     "tensor_parallel_size of 1."),
    (422, "ranks_do_not_fit", "link.world_size",
     "Count num_workers of every server's contract, and 1 for the learner."),
    (504, "transfer_timeout", None,
     "Open a new link; learner and servers have to reach each other and send at the same time."),
    (422, "foreign_gpu", "link.gpu_uuid",
     "Put learner and server on one GPU, or use the transport nccl or http."),
    (503, "transfer_failed", None,
     "See this service's log; open a new link, or use the transport http."),
)
# fmt: on


def _spec(
    status: int, code: str, field: str | None, fix: str, retry_after_s: str | None = None
) -> ErrorSpec:
    return ErrorSpec(status, code, fix=fix, field=field, retry_after_s=retry_after_s)


SPECS = {row[1]: _spec(*row) for row in _ROWS}
# Callers see one code for sleep: a data call may come later, a control call conflicts with it.
SPECS["must_be_awake"] = ErrorSpec(409, "sleeping", fix="POST /v1/wake_up first.")

ERRORS: ErrorTable = {
    RolloutError: lambda error: SPECS[error.code],
    RequestConflictError: SPECS["request_id_reused"],
    RequestUnknownError: SPECS["request_unknown"],
    RequestCancelledError: SPECS["request_cancelled"],
}
