"""The shapes of known models, for `GPTConfig.preset`. Fields that are not named here keep GPTConfig's defaults."""

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape(*values, **more) -> dict:
    return {**dict(zip(FIELDS, values, strict=True)), **more}


PRESETS = {
    # the one that ships in data/base
    "base": shape(192, 512, 6, 6, 2, vocab_size=3072, max_position_embeddings=512, tie_word_embeddings=True),
    "tinyllama-1.1b": shape(2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    "llama-7b": shape(4096, 11008, 32, 32, 32, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "llama-13b": shape(5120, 13824, 40, 40, 40, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "llama-33b": shape(6656, 17920, 60, 52, 52, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "llama-65b": shape(8192, 22016, 80, 64, 64, max_position_embeddings=2048),
    "llama-2-7b": shape(4096, 11008, 32, 32, 32),
    "llama-2-70b": shape(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": shape(
        *(4096, 14336, 32, 32, 8),
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
}
