"""Where the noise goes in a Hugging Face model: its decoder layers and its output layer."""

from torch import nn


def find_output_layer(model: nn.Module) -> nn.Module:
    """The module of a Hugging Face model that turns hidden states into logits.

    Raises:
        ValueError: the model has none; the message names the class.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ValueError(
            f"{type(model).__name__} has no output layer to perturb. Use --alp.layers all, or a "
            "causal LM"
        )
    return output


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Hugging Face model, in order; ValueError as `find_decoder`."""
    return find_decoder(model).layers


def find_decoder(model: nn.Module) -> nn.Module:
    """The module of a Hugging Face model whose `layers` are its decoder layers.

    Follows `get_decoder()` through PEFT wrappers and, for models with a vision tower, into the
    language model.

    Raises:
        ValueError: nothing there has a non-empty `layers`; the message names the class.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for candidate in (decoder, *(getattr(decoder, n, None) for n in ("model", "language_model"))):
        layers = getattr(candidate, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            return candidate
    raise ValueError(
        f"{type(model).__name__}: found no decoder layers to perturb. `get_decoder().layers` must "
        f"be a non-empty ModuleList, but the decoder is {type(decoder).__name__}. Use a causal LM "
        "of the Llama, Qwen, Mistral, GPT-NeoX family or one laid out like them"
    )
