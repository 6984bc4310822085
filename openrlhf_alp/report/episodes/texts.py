"""What each token id says. A page shows tokens one by one, so each is decoded by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from openrlhf_alp.replay.files.records import RecordedSample

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def local_vocabulary(samples: Sequence[RecordedSample]) -> tuple[list[int], np.ndarray]:
    """The ids that occur, in order, and every token of the batch as its place among them.

    Returns:
        ids, and (sum of T,) uint32.
    """
    tokens = np.concatenate([sample.token_ids for sample in samples])
    ids, places = np.unique(tokens, return_inverse=True)
    return [int(i) for i in ids], places.astype(np.uint32)


def token_texts(ids: Sequence[int], tokenizer: Any | None) -> list[str]:
    """Text of each id; an id in angle brackets without a tokenizer, or outside of it.

    A token that is a part of a character has no text of its own; it shows its bytes.
    """
    if tokenizer is None:
        return [f"<{i}>" for i in ids]
    texts = []
    for i in ids:
        text = tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text or _REPLACEMENT in text:
            text = str(tokenizer.convert_ids_to_tokens(i) or f"<{i}>")
        texts.append(text)
    return texts
