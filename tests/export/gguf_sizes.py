"""Settings of the tiny models whose GGUF files are looked at."""

from __future__ import annotations

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
