"""Generates text with a model of `transformers`, with full attention or MoBA."""

import argparse

import moba
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--attn", default="moba", choices=("sdpa", "moba", "moba_naive"))
    parser.add_argument("--moba-chunk-size", type=int, default=4096, help="tokens in a block")
    parser.add_argument("--moba-topk", type=int, default=12, help="blocks a token attends to")
    parser.add_argument("--prompt", default="how are you?")
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate")
    arguments = parser.parse_args()
    try:
        routing = moba.MoBAConfig(arguments.moba_chunk_size, arguments.moba_topk)
    except ValueError as error:
        parser.error(str(error))

    moba.register_moba()
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation=arguments.attn, dtype="auto"
        )
    except OSError as error:
        parser.error(f"--model {arguments.model}: {error}")
    model.config.moba_chunk_size = routing.moba_chunk_size
    model.config.moba_topk = routing.moba_topk
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
