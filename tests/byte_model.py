"""Small random models whose tokens are bytes."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def save_byte_model(folder, **config):
    """Save a Llama of 256 tokens, the fields of `config` given, and its tokenizer; return the folder."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=256, intermediate_size=96, **config)
    ).save_pretrained(folder)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
