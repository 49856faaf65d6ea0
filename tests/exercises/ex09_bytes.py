"""Exercise 09: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "experiments.simulate": """
def shapes_of_layer(c):
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width, wide = c.hidden_size, c.intermediate_size
    yield from [(q, width, c.attention_bias), (kv, width, c.attention_bias), (kv, width, c.attention_bias)]
    yield width, q, c.attention_bias
    yield from [(wide, width, c.mlp_bias)] * 2
    yield width, wide, c.mlp_bias


def count_base_parameters(config):
    one_layer = 2 * config.hidden_size
    for out, inside, bias in shapes_of_layer(config):
        one_layer += out * inside
        if bias:
            one_layer += out
    heads = 1 if config.tie_word_embeddings else 2
    ends = config.hidden_size * (heads * config.vocab_size + 1)
    return config.num_hidden_layers * one_layer + ends


def predict(model, dtype):
    size = torch.tensor([], dtype=dtype).element_size()
    floats = count_base_parameters(model.config)
    weights = 0
    for layer in quantized_layers(model).values():
        floats -= layer.out_features * layer.in_features
        weights += bytes_in_4_bits(layer)
    weights += size * floats

    trained = 0
    for _, layer in lora_layers(model):
        trained += 4 * (layer.r * layer.in_features + layer.out_features * layer.r)
    weights += trained
    gradients = trained or size * floats
    tensors = len([p for p in model.parameters() if p.requires_grad])
    return dict(weights=weights, gradients=gradients, optimizer=gradients + gradients + 4 * tensors)


def bytes_in_4_bits(layer):
    n = layer.out_features * layer.in_features
    codes = (n + 1) // 2
    N = -(-n // layer.quantization.block_size)
    if not layer.quantization.double_quant:
        return codes + 4 * N
    groups = -(-N // 256)
    return codes + N + 4 * groups + 4
"""
}

MUTANTS = [
    Mutant("head forgotten", "heads = 1 if config.tie_word_embeddings else 2", "heads = 1", "the head is missing"),
    Mutant("tied counted twice", "1 if config.tie_word_embeddings else 2", "2", "the tied matrix is counted twice"),
    Mutant("norms forgotten", "one_layer = 2 * config.hidden_size", "one_layer = 0", "norms in the layers are missing"),
    Mutant("last norm forgotten", "config.vocab_size + 1)", "config.vocab_size)", "the last norm is missing"),
    Mutant("one layer", "return config.num_hidden_layers * one_layer", "return one_layer", "counted once"),
    Mutant("two MLP matrices", "[(wide, width, c.mlp_bias)] * 2", "[(wide, width, c.mlp_bias)]", "three matrices"),
    Mutant("k and v as wide as q", "c.num_key_value_heads *", "c.num_attention_heads *", "not as wide as q"),
    Mutant(
        "head_dim ignored",
        ("c.num_attention_heads * c.head_dim", "c.num_key_value_heads * c.head_dim"),
        ("c.hidden_size", "c.num_key_value_heads * c.hidden_size // c.num_attention_heads"),
        "D is config.head_dim",
    ),
    Mutant("biases forgotten", "if bias:", "if False:", "the biases of attention are missing"),
    Mutant(
        "MLP's biases forgotten", "yield width, wide, c.mlp_bias", "yield width, wide, False", "down has a bias as well"
    ),
    Mutant("o's bias as wide as q", "yield width, q, c", "yield q, width, c", "the bias of o has C numbers"),
    Mutant("scales forgotten", "return codes + 4 * N", "return codes", "the scales are missing"),
    Mutant(
        "short block forgotten",
        "-(-n // layer.quantization.block_size)",
        "n // layer.quantization.block_size",
        "the last, short block",
    ),
    Mutant("odd code forgotten", "(n + 1) // 2", "n // 2", "round n/2 up"),
    Mutant("halves as floats", "(n + 1) // 2", "n / 2", "bytes are whole numbers"),
    Mutant("a byte a code", "(n + 1) // 2", "n", "two codes fit in a byte"),
    Mutant(
        "double quantization ignored",
        "if not layer.quantization.double_quant:",
        "if True:",
        "without double quantization",
    ),
    Mutant("offset forgotten", "4 * groups + 4", "4 * groups", "the offset is missing"),
    Mutant("short group forgotten", "-(-N // 256)", "N // 256", "round N/256 up"),
    Mutant("always 4 bytes", "size = torch.tensor([], dtype=dtype).element_size()", "size = 4", "itemsize"),
    Mutant("one average", "optimizer=gradients + gradients", "optimizer=gradients", "you count one"),
    Mutant("step counts forgotten", "gradients + 4 * tensors", "gradients", "the step counts are missing"),
    Mutant("one step count", "4 * tensors", "4", "not one for all"),
    Mutant("frozen tensors' step counts", " if p.requires_grad", "", "only trained tensors have a step count"),
    Mutant("gradients of the base", "trained or size * floats", "trained + size * floats", "the base is frozen"),
    Mutant("adapters in the base's dtype", "trained += 4 *", "trained += size *", "adapters are float32"),
    Mutant("adapters forgotten", "weights += trained", "pass", "the adapters are missing"),
    Mutant("B forgotten", " + layer.out_features * layer.r)", ")", "B is missing"),
    Mutant(
        "4 bits on top",
        "floats -= layer.out_features * layer.in_features",
        "pass",
        "counted in dtype as well",
    ),
    Mutant("codes forgotten", "weights += bytes_in_4_bits(layer)", "pass", "the codes and scales are missing"),
]
