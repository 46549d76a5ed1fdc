"""Sizes of published Llama models, as fields of a ModelSpec."""

LLAMA_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "context_length": 131072,
    "tie_word_embeddings": False,
    "parameters": 8_030_261_248,
}
LLAMA_70B = LLAMA_8B | {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_heads": 64,
    "intermediate_size": 28672,
    "parameters": 70_553_706_496,
}
LLAMA_405B = LLAMA_8B | {
    "num_layers": 126,
    "hidden_size": 16384,
    "num_heads": 128,
    "intermediate_size": 53248,
    "parameters": 405_853_388_800,
}
