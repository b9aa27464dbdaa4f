"""genai_config.json: what ONNX Runtime GenAI must know of a folder to generate with it."""

from __future__ import annotations

from typing import Any

from graft.export.layers import model_ids
from graft.model.gguf.layout import head_dim
from graft.model.load import LoadedModel
from graft.text import quoted
from graft.understood import tokenizing

CONFIG = "genai_config.json"
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_CLASSES = (
    *("TokenizersBackend", "PreTrainedTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer"),
    *("Qwen2Tokenizer", "GemmaTokenizer", "GPT2Tokenizer", "Phi3Tokenizer", "GPTNeoXTokenizer"),
    *("CodeGenTokenizer", "InternLM2Tokenizer", "BaichuanTokenizer", "MistralCommonBackend"),
)
"""Tokenizer classes that it takes for a tokenizer.json; it also takes them with 'Fast' behind."""


def genai_config(loaded: LoadedModel, graph: str) -> dict[str, Any]:
    """Return the configuration, for the graph of that name.

    Answers end, and are searched for, as generation_config.json says.
    """
    config, ids = loaded.model.config, model_ids(loaded)
    generation = loaded.model.generation_config
    stored = {} if generation is None else generation.to_dict()
    context = int(config.max_position_embeddings)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    cache = {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    longer = {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}
    model: dict[str, Any] = {
        "type": config.model_type,
        "vocab_size": int(config.vocab_size),
        "context_length": context,
        "eos_token_id": ids.ends,
        "pad_token_id": ids.pad,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": graph,
            "head_size": head_dim(config),
            "hidden_size": int(config.hidden_size),
            "num_attention_heads": int(config.num_attention_heads),
            "num_key_value_heads": int(config.num_key_value_heads),
            "num_hidden_layers": int(config.num_hidden_layers),
            "inputs": inputs | cache,
            "outputs": {"logits": "logits"} | longer,
        },
    }
    if ids.begin is not None:
        model["bos_token_id"] = ids.begin
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": False}
    search |= {name: stored[name] for name in _SEARCH if stored.get(name) is not None}
    return {"model": model, "search": search}


def genai_notes(loaded: LoadedModel) -> tuple[str, ...]:
    """Return what to tell where the program does not cut texts as the tokenizer does."""
    tokenizer = loaded.tokenizer
    kind = type(tokenizer).__name__
    if kind.removesuffix("Fast") not in _CLASSES:
        return (
            f"ONNX Runtime GenAI takes no tokenizer of class {kind}: it computes with the folder, "
            "and texts are to be cut with Transformers' tokenizer",
        )
    with tokenizing():
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if begins and tokenizer.bos_token_id == tokenizer.eos_token_id:
        return (
            f"ONNX Runtime GenAI, asked for special tokens, puts {quoted(tokenizer.eos_token)} "
            "behind a text too, because it is this tokenizer's begin and end token; write it "
            "before a prompt yourself",
        )
    return ()
