"""Small transformers models with random weights, and functions that run them."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}


def build(family, **changes):
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"head_dim": 16} | changes)))
    else:
        model = MistralForCausalLM(
            MistralConfig(**(SIZES | {"sliding_window": None, "head_dim": 16} | changes))
        )
    return model.eval()


def logits(model, implementation, ids, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(ids, **options).logits


def generated(model, implementation, ids, tokens=16, **options):
    model.set_attn_implementation(implementation)
    ids = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, suppress_tokens=[0], **options
    )  # 0 is padding
    return ids[:, -tokens:].tolist()


def random_ids(batch, tokens, seed=0):
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))
