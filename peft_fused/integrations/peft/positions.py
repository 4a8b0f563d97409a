"""Where adapters on the output of a layer go by default, by model type."""

_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2")
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

# position -> model type -> target_modules, as PEFT reads them: names, or a regular expression.
POSITIONS: dict[str, dict[str, list[str] | str]] = {
    # After the output of the attention and after that of the feed-forward block (Houlsby et al. 2019).
    "houlsby": {
        **{name: ["output.dense"] for name in _BERT_LIKE},
        "vit": ["output.dense", "o_proj", "mlp.fc2"],  # before and after transformers renamed them
        "distilbert": ["out_lin", "lin2"],
        "gpt2": ["c_proj"],
        **{name: ["o_proj", "down_proj"] for name in _LLAMA_LIKE},
    },
    # After the output of the feed-forward block (AdaMix, Wang et al. 2022).
    "adamix": {
        **dict.fromkeys(_BERT_LIKE, r".*layer\.\d+\.output\.dense"),
        "vit": r".*(layer\.\d+\.output\.dense|mlp\.fc2)",
        "distilbert": r".*ffn\.lin2",
        "gpt2": r".*mlp\.c_proj",
        **{name: ["down_proj"] for name in _LLAMA_LIKE},
    },
    # Before the norm that ends the feed-forward block, of whose result the bottleneck is taken (Pfeiffer et al. 2021).
    "pfeiffer": {
        # DeBERTa's first version has a norm of its own, which is no torch.nn.LayerNorm.
        **dict.fromkeys((t for t in _BERT_LIKE if t != "deberta"), r".*layer\.\d+\.output\.LayerNorm"),
        "distilbert": r".*output_layer_norm",
    },
}


def default_targets(position: str, model_type: str | None) -> set[str] | str:
    """target_modules of a position. ValueError if it is not known for that type of model."""
    known = POSITIONS[position]
    if model_type not in known:
        raise ValueError(
            f"target_modules must be given for kind='adapter' in position {position!r} on a model of type "
            f"{model_type!r}; known are {', '.join(sorted(known))}"
        )
    targets = known[model_type]
    return targets if isinstance(targets, str) else set(targets)
