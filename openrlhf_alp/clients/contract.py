"""The check before step 1: may this learner train on this server's tokens?"""

from dataclasses import asdict, dataclass
from typing import Any

from openrlhf_alp.clients.errors import ContractMismatch
from services.rollout.wire.fingerprint import chat_template_hash, tokenizer_hash
from services.rollout.wire.schemas import API_VERSION, Contract, WeightTransport

PROCESSED_LOGPROBS = "processed_logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerExpectation:
    """What the server must serve, by the contract's field names. None: not compared."""

    api_version: str = API_VERSION
    """Version of the wire format that this client speaks."""

    tokenizer_hash: str
    """`services.rollout.wire.fingerprint.tokenizer_hash` of the learner's tokenizer."""

    chat_template_hash: str | None = None
    """Hash of the learner's template; None when the learner sends ids made elsewhere."""

    vocab_size: int | None = None
    """Rows of the learner's embedding."""

    architecture: str | None = None
    """First entry of the learner's `config.architectures`."""

    dtype: str | None = None
    """Serving dtype, when the learner insists on one."""

    logprobs_mode: str = PROCESSED_LOGPROBS
    """ALP's denominator is the distribution that the tokens were really sampled from."""

    min_model_len: int = 1
    """Longest prompt plus answer that the learner will ask for; the server may allow more."""

    @classmethod
    def of(cls, tokenizer: Any, model: Any, *, min_model_len: int) -> "LearnerExpectation":
        """What a learner with this Hugging Face tokenizer and model config can train on."""
        return cls(
            tokenizer_hash=tokenizer_hash(tokenizer),
            chat_template_hash=chat_template_hash(tokenizer),
            vocab_size=model.get_text_config().vocab_size,
            architecture=(model.architectures or [None])[0],
            min_model_len=min_model_len,
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


def simulated_mismatch(contract: Contract) -> str | None:
    """One sentence when the server rounds its weights on purpose, or None."""
    if contract.simulated_quantization is None:
        return None
    return (
        f"the service simulates {contract.simulated_quantization} quantization "
        "(--simulate-quantization): its policy differs from the pushed weights on purpose"
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
    learner = asdict(expected)
    problems = [
        f"{field}: learner {learner[field]}, server {getattr(contract, field)}. Fix: {fix}"
        for field, fix in _FIXES.items()
        if learner[field] is not None and learner[field] != getattr(contract, field)
    ]
    if contract.max_model_len < expected.min_model_len:
        problems.append(
            f"max_model_len: learner needs {expected.min_model_len}, server "
            f"{contract.max_model_len}. Fix: raise --max-model-len of the service or shorten "
            "prompts and answers."
        )
    if problems:
        raise ContractMismatch(
            "The rollout service does not serve what the learner trains:\n  "
            + "\n  ".join(problems)
        )
