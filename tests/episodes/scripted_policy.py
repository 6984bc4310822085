"""A character tokenizer with a chat template, and a policy that says what a test wrote down."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openrlhf_alp.episodes.records import Completion, SamplingConfig, VersionSpan

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, *, end_is_special: bool = True
) -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\r", "\t"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = ["<|im_end|>", "<|im_start|>", "<eos>"]
    if not end_is_special:
        backend.add_tokens([AddedToken(special.pop(0), special=False, normalized=False)])
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=special[:-1]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


class ScriptedPolicy:
    """An engine that samples the turns of a script, and remembers what it was asked.

    It keeps the engine's rules: a turn ends at a stop string, at the token budget, or where the
    script says `<eos>` or `<|im_end|>`. What a turn still had to say is said when the next request
    goes on where the last one ended, and is forgotten when an observation came in between.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *turns: str) -> None:
        self._tokenizer = tokenizer
        self._left = [tokenizer.encode(turn, add_special_tokens=False) for turn in turns]
        self._ends = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
        self.asked: list[tuple[str, tuple[int, ...], SamplingConfig]] = []
        self.sampled: list[tuple[int, ...]] = []

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        goes_on = not self.sampled or self._seen() == tuple(prompt_ids)
        self.asked.append((request_id, tuple(prompt_ids), sampling))
        if not goes_on:
            self._left.pop(0)
        turn = self._left[0]
        drawn: list[int] = []
        finish_reason, stop_reason = "length", None
        while len(drawn) < sampling.max_tokens and finish_reason == "length":
            drawn.append(turn.pop(0))
            text = self._tokenizer.decode(drawn)
            hit = next((stop for stop in sampling.stop if stop in text), None)
            if drawn[-1] in self._ends or hit is not None:
                finish_reason, stop_reason = "stop", hit
        self.sampled.append(tuple(drawn))
        version = len(self.asked)
        return Completion(
            token_ids=tuple(drawn),
            logprobs=tuple(-0.01 * (1 + token) for token in drawn),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            spans=(VersionSpan(version=version, digest=f"d{version}", start=0, end=len(drawn)),),
        )

    def _seen(self) -> tuple[int, ...]:
        """Ids of the last request and of what was sampled for it."""
        return self.asked[-1][1] + self.sampled[-1]
