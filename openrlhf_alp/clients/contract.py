"""The handshake before step 1: may this learner train on this server's tokens?"""

from dataclasses import dataclass
from typing import Any

from openrlhf_alp.clients.errors import ContractMismatch
from services.rollout.wire.fingerprint import chat_template_hash, tokenizer_hash
from services.rollout.wire.schemas import API_VERSION, Contract, WeightTransport

PROCESSED_LOGPROBS = "processed_logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerExpectation:
    """What the learner has, and so what the server must serve. None: not compared."""

    tokenizer_hash: str
    """`services.rollout.wire.fingerprint.tokenizer_hash` of the learner's tokenizer."""

    chat_template_hash: str | None = None
    """Of the learner's template; None when the learner sends ids made elsewhere."""

    vocab_size: int | None = None
    """Rows of the learner's embedding."""

    architecture: str | None = None
    """First entry of the learner's `config.architectures`."""

    min_model_len: int = 1
    """Longest prompt plus answer that the learner will ask for."""

    dtype: str | None = None
    """Serving dtype, when the learner insists on one."""

    logprobs_mode: str = PROCESSED_LOGPROBS
    """ALP's denominator is the distribution the tokens were really drawn from."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **fields: Any) -> "LearnerExpectation":
        """Fill both hashes from a Hugging Face tokenizer."""
        return cls(
            tokenizer_hash=tokenizer_hash(tokenizer),
            chat_template_hash=chat_template_hash(tokenizer),
            **fields,
        )


def require_transport(contract: Contract, transport: WeightTransport, url: str) -> None:
    """Refuse a server that cannot take weights this way.

    Raises:
        ContractMismatch: names the transports that it has, and the fix.
    """
    if transport not in contract.weight_transports:
        raise ContractMismatch(
            f"--rollout.weight_transport {transport}: {url} takes weights over "
            f"{', '.join(contract.weight_transports)} only. Fix: choose one of these; nccl and ipc "
            "need the vLLM engine on CUDA, and ipc a tensor_parallel_size of 1."
        )


_SAME_MODEL = "Serve and train the same model folder."
_FIXES = {
    "api_version": "Install the same release on both sides.",
    "tokenizer_hash": "Start both sides from the same tokenizer files.",
    "chat_template_hash": "Start both sides from the same chat template.",
    "vocab_size": _SAME_MODEL,
    "architecture": _SAME_MODEL,
    "dtype": "Start the service with the learner's dtype (--dtype).",
    "logprobs_mode": "Start the engine with processed log-probs.",
}


def check_contract(contract: Contract, expected: LearnerExpectation) -> None:
    """Compare field by field.

    Raises:
        ContractMismatch: lists every field that differs, with both values and the fix.
    """
    wanted = {
        "api_version": API_VERSION,
        "tokenizer_hash": expected.tokenizer_hash,
        "chat_template_hash": expected.chat_template_hash,
        "vocab_size": expected.vocab_size,
        "architecture": expected.architecture,
        "dtype": expected.dtype,
        "logprobs_mode": expected.logprobs_mode,
    }
    problems = []
    for field, learner in wanted.items():
        server = getattr(contract, field)
        if learner is not None and learner != server:
            problems.append(f"{field}: learner {learner}, server {server}. Fix: {_FIXES[field]}")
    if contract.max_model_len < expected.min_model_len:
        problems.append(
            f"max_model_len: learner needs {expected.min_model_len}, "
            f"server {contract.max_model_len}. "
            "Fix: raise --max-model-len of the service or shorten prompts and answers."
        )
    if problems:
        raise ContractMismatch(
            "The rollout service does not serve what the learner trains:\n  "
            + "\n  ".join(problems)
        )
