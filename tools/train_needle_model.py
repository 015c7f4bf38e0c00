#!/usr/bin/env python3
"""Train models/needle-2m with `moba train`: a small decoder that finds facts in real text.

The text is installed with the set-up: Python's standard library, C++ headers, licences and package documentation. Facts are
planted in it, and questions for them follow at its end. Stages go from short documents to longer ones, each continuing from
the last; a run that was killed resumes when started again. Text that is kept from training is written for
`moba eval needle --data`: tuning.txt to choose settings, held-out.txt for scores.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from needles import FIRST, SECOND, fact, listed_key, question, texts
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 2048
LONGEST = 262144  # tokens that the config allows; far fewer are trained

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    # The slowest rotations turn little over the longest context.
    "rope_theta": 1e8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# In the longest stages, rotations with periods of more than 8192 tokens are slowed by a factor.
ROPE_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Initial alignment of the queries and keys that compare contents.
ALIGNED = 0.6


def first_weights(folder, seed):
    """Write random weights that favour recall, after mimetic initialisation (arXiv 2305.09828): heads of the first layer
    attend 0 to 3 tokens back, two of the second 4 and 5, by biases of queries and keys that RoPE rotates; queries and keys
    of the other heads begin aligned, so that a token whose predecessors are those of the next token scores slightly higher,
    and their values and outputs begin as each other's transpose. Small models learn such heads by themselves, but spend
    most of their training on it."""
    draws = np.random.default_rng(seed)
    width, inner, size = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    heads, groups, layers = (
        CONFIG[f"num_{n}"] for n in ("attention_heads", "key_value_heads", "hidden_layers")
    )

    def noise(rows, columns, scale=1.0):
        return draws.normal(0, scale * CONFIG["initializer_range"], (rows, columns))

    def rotation(rows):
        return np.linalg.qr(draws.normal(size=(rows, rows)))[0]

    frequency = CONFIG["rope_theta"] ** (-np.arange(size // 2) / (size // 2))
    strength = np.where(frequency > 0.15, 8.0, 4.0)
    slow = np.tile(frequency < 2e-4, 2)[
        :, None
    ]  # these dimensions rotate little and compare contents

    def bias_for(distance):
        """Return the query bias whose score with bias_for(0), the key bias, is highest `distance` tokens back."""
        angle = -distance * frequency
        return np.concatenate([strength * np.cos(angle), strength * np.sin(angle)])

    token = rotation(width)[:size]  # [size, width] reads a token
    back = rotation(width).reshape(
        heads, size, width
    )  # where the first layer writes tokens 0 to 3 back
    gist = rotation(width)[:size]  # mixes these four into one
    earlier = rotation(width)[: 2 * size].reshape(
        2, size, width
    )  # where the second writes those of 4 and 5 back

    out = {
        "model.embed_tokens.weight": noise(VOCABULARY, width),
        "model.norm.weight": np.ones(width),
    }
    for layer in range(layers):
        q, k, v = (
            noise(heads * size, width, 0.3),
            noise(groups * size, width, 0.3),
            noise(groups * size, width, 0.3),
        )
        o = noise(width, heads * size, 0.3)
        q_bias, k_bias = np.zeros(heads * size), np.zeros(groups * size)

        def rows(index):
            return slice(index * size, (index + 1) * size)

        for head in range(heads):
            group = head * groups // heads
            if layer == 0 or layer == 1 and group == 0:
                q_bias[rows(head)] = bias_for(head + 4 * layer)
                k_bias[rows(group)] = bias_for(0)
                v[rows(group)] = gist if layer else token
                o[:, rows(head)] = 0.12 * (earlier if layer else back)[head].T
            elif head % (heads // groups) == 0:
                turns = [rotation(size) for _ in range(4)]
                query = sum(turn @ back[i] for i, turn in enumerate(turns[:3]))
                key = sum(turn @ back[i + 1] for i, turn in enumerate(turns[:3]))
                if layer > 1:
                    query, key = query + turns[3] @ earlier[0], key + turns[3] @ earlier[1]
                k[rows(group)] += ALIGNED * slow * key
                v[rows(group)] = back[0]
                for other in range(head, head + heads // groups):
                    q[rows(other)] += ALIGNED * slow * query
                    o[:, rows(other)] = 0.06 * token.T
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{name}{norm}.weight"] = np.ones(width)
        out |= {
            f"{name}self_attn.{part}_proj.weight": matrix
            for part, matrix in zip("qkvo", (q, k, v, o))
        }
        out |= {
            f"{name}self_attn.{part}_proj.bias": bias
            for part, bias in zip("qkv", (q_bias, k_bias, np.zeros(groups * size)))
        }
        out |= {f"{name}mlp.{part}_proj.weight": noise(inner, width) for part in ("gate", "up")}
        out[f"{name}mlp.down_proj.weight"] = noise(width, inner, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: np.ascontiguousarray(value, np.float32) for key, value in out.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


# ---------------------------------------------------------------- tokens and text


def make_tokenizer(folder, corpus, chance):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Enough questions and facts that their words are tokens.
    planted = [
        "\n".join([fact(key, 1), question(key)])
        for key in (listed_key(chance) for _ in range(40_000))
    ]
    tokenizer.train_from_iterator(
        corpus[::3] + planted,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": LONGEST,
            },
            indent=2,
        )
        + "\n"
    )
    return tokenizer


# ---------------------------------------------------------------- documents


class Haystack:
    """Lines of real text, taken consecutively from a random line on."""

    def __init__(self, tokenizer, corpus):
        self.lines, self.sizes, self.words = [], [], set()
        for text in corpus:
            lines = [line[:300] for line in text.split("\n")]
            self.lines += lines
            self.words.update(
                w for line in lines[::20] for w in line.split() if w.isalpha() and 3 <= len(w) <= 9
            )
        for begin in range(0, len(self.lines), 100_000):
            batch = [line + "\n" for line in self.lines[begin : begin + 100_000]]
            self.sizes += [len(e.ids) for e in tokenizer.encode_batch(batch)]
        self.words = sorted({w.lower() for w in self.words})

    def take(self, tokens, chance):
        """Return consecutive lines of at most `tokens` tokens."""
        at, taken = chance.randrange(len(self.lines)), []
        while True:
            tokens -= self.sizes[at]
            if tokens < 0:
                return taken
            taken.append(self.lines[at])
            at = (at + 1) % len(self.lines)

    def key(self, chance, listed=0.7):
        """Return a key: from the lists with probability `listed`, else of words of the text."""
        if chance.random() < listed:
            return listed_key(chance)
        return f"{chance.choice(self.words)}-{chance.choice(self.words)}"


@dataclass
class Stage:
    name: str
    seq_len: int
    batch_tokens: int
    steps: int
    lr: float
    chunk: int
    top_k: int
    facts: tuple  # minimum and maximum number of facts planted
    questions: int  # maximum
    plain: float  # share of documents that are plain text
    dense: float = 0  # share of the others that are dense_document
    shortest: int = 0  # tokens of the shortest document; 0: all have the length of the stage
    slower: int = 0  # factor that slows the slow rotations when the stage begins
    sharper: float = 1.0  # factor that scales the queries of heads that compare contents then
    options: tuple = ()


def random_number(chance):
    return "".join(chance.choices("0123456789", k=chance.choice((4, 5, 5, 5, 6, 7))))


def recall_document(stage, haystack, chance):
    """Return text with facts planted in it, and questions with answers."""
    count = chance.randint(*stage.facts)
    asked = min(count, stage.questions)
    facts = {}
    while len(facts) < count:
        facts[haystack.key(chance)] = random_number(chance)
    budget = stage.seq_len * 0.96 - 18 * count - 36 * asked
    if stage.seq_len > 4096 and chance.random() < 0.5:  # so that the distances of the answers vary
        budget *= chance.uniform(0.3, 1)
    lines = haystack.take(budget * (chance.random() if stage.seq_len <= 512 else 1), chance)
    for key, number in facts.items():
        lines.insert(chance.randint(0, len(lines)), fact(key, number))
    pairs = [f"{question(key)} {facts[key]}.\n" for key in chance.sample(list(facts), asked)]
    return {"prompt": "\n".join(lines) + "\n", "completion": "".join(pairs)}


def mixed_document(stage, haystack, chance):
    """Return text of any length from the stage's shortest on, shorter ones more often, with facts planted in it, some of
    them near its ends, and questions with answers."""
    size = math.exp(chance.uniform(math.log(stage.shortest), math.log(stage.seq_len * 0.96)))
    count = chance.randint(stage.facts[0], min(stage.facts[1], int(size / 100)))
    asked = min(count, stage.questions)
    facts = {}
    while len(facts) < count:
        facts[haystack.key(chance, 0.5)] = random_number(chance)
    lines = haystack.take(size - 18 * count - 36 * asked, chance)
    for key, number in facts.items():
        near = min(5, len(lines))
        first, last = chance.choices(
            ((0, len(lines)), (0, near), (len(lines) - near, len(lines))), (8, 1, 1)
        )[0]
        lines.insert(chance.randint(first, last), fact(key, number))
    pairs = [f"{question(key)} {facts[key]}.\n" for key in chance.sample(list(facts), asked)]
    return {"prompt": "\n".join(lines) + "\n", "completion": "".join(pairs)}


def dense_document(stage, haystack, chance):
    """Return a document without a haystack: lines, and the same lines repeated in random order."""
    if chance.random() < 0.5:
        keys = [haystack.key(chance) for _ in range(chance.randint(2, 5))]
        lines = [fact(key, random_number(chance)) for key in keys]
    else:
        lines = [
            " ".join(
                random_number(chance) if chance.random() < 0.3 else chance.choice(FIRST + SECOND)
                for _ in range(chance.randint(4, 9))
            )
            for _ in range(chance.randint(2, 6))
        ]
    repeats = []
    while len("".join(repeats)) + len("".join(lines)) < 2.2 * stage.seq_len:
        repeats.append(chance.choice(lines) + "\n")
    return {"prompt": "\n".join(lines) + "\n", "completion": "".join(repeats)}


def write_data(stage, path, tokenizer, haystack, seed):
    """Write enough documents for every step, each within the stage's length."""
    chance = random.Random(f"{seed} {stage.name}")
    wanted, tokens = stage.steps * stage.batch_tokens * 1.02, 0
    with path.open("w", encoding="utf-8") as file:
        while tokens < wanted:
            documents = []
            for _ in range(max(4, 1_000_000 // stage.seq_len)):
                if chance.random() < stage.plain:
                    documents.append(
                        {"text": "\n".join(haystack.take(stage.seq_len * 0.9, chance))}
                    )
                elif chance.random() < stage.dense:
                    documents.append(dense_document(stage, haystack, chance))
                else:
                    make = mixed_document if stage.shortest else recall_document
                    documents.append(make(stage, haystack, chance))
            sizes = tokenizer.encode_batch(["".join(d.values()) for d in documents])
            for document, size in zip(documents, sizes):
                if 0 < len(size.ids) < stage.seq_len - 2:
                    tokens += len(size.ids)
                    file.write(json.dumps(document) + "\n")


STAGES = [
    Stage(
        "recall", 256, 4096, 200, 2e-3, 128, 2, (2, 6), 4, 0.0, 0.7, ("--lr-schedule", "constant")
    ),
    Stage("1k", 1024, 8192, 160, 2e-3, 128, 4, (3, 14), 6, 0.1),
    Stage("4k", 4096, 8192, 40, 1.5e-3, 128, 6, (3, 24), 8, 0.1),
    Stage("16k", 16384, 16384, 40, 1e-3, 128, 10, (1, 40), 12, 0.1),
    Stage("32k", 32768, 32768, 10, 4e-4, 128, 16, (1, 40), 12, 0.05, slower=16, sharper=2.0),
    Stage("mixed", 32768, 40960, 100, 6e-4, 128, 16, (1, 100), 64, 0.0, shortest=2048, slower=64),
    Stage("128k", 131072, 131072, 12, 2e-4, 128, 16, (1, 120), 80, 0.0, shortest=16384),
    Stage("64k", 65536, 65536, 32, 3e-4, 128, 16, (1, 150), 100, 0.0, shortest=2048),
]


def extend_context(last, folder, slower, sharper):
    """Prepare the model for longer contexts: slow down the slow rotations (as Llama 3.1), and scale up the queries of the
    heads that compare contents, so that the matching token stands out among more of them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(last / "model.safetensors")
    size, heads = CONFIG["head_dim"], CONFIG["num_attention_heads"]
    for layer, first in ((1, heads // 2), (2, 0)):
        for part in ("weight", "bias"):
            weights[f"model.layers.{layer}.self_attn.q_proj.{part}"][first * size :] *= sharper
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((last / "config.json").read_text()) | {
        "rope_scaling": ROPE_SCALING | {"factor": float(slower)}
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(last / name, folder)


def publish(last, folder):
    """Write the weights in bf16, the tokenizer, and the config with the model's routing."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.bfloat16() for name, tensor in load_file(last / "model.safetensors").items()
    }
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scaling = json.loads((last / "config.json").read_text())["rope_scaling"]
    blocks = {
        "moba_chunk_size": STAGES[-1].chunk,
        "moba_topk": STAGES[-1].top_k,
        "moba_sink": 0,
        "moba_full_tail": 0,
    }
    config = CONFIG | {"rope_scaling": scaling, "dtype": "bfloat16"} | blocks
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(last / name, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--moba", type=Path, default=ROOT / "build/release/moba", help="the program"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/needle-2m",
        help="folder for data and checkpoints",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "models/needle-2m", help="folder for the finished model"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=2, help="the same weights come of the same number"
    )
    parser.add_argument("--until", help="stop after this stage")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    for kept in ("tuning", "held-out"):
        (options.work / f"{kept}.txt").write_text("\n".join(texts(kept)), encoding="utf-8")
    corpus = texts("training")
    folder = options.work / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(folder, corpus, random.Random(options.seed))
    last, haystack = options.work / "first", None
    first_weights(last, options.seed)
    for file in folder.iterdir():
        shutil.copy(file, last)
    for stage in STAGES:
        data = options.work / f"{stage.name}.jsonl"
        if not data.exists():
            haystack = haystack or Haystack(tokenizer, corpus)
            write_data(stage, data, tokenizer, haystack, options.seed)
    for stage in STAGES:
        if stage.slower:
            stretched = options.work / f"{stage.name}-first"
            extend_context(last, stretched, stage.slower, stage.sharper)
            last = stretched
        data, out = options.work / f"{stage.name}.jsonl", options.work / stage.name
        subprocess.run(
            [
                *map(
                    str,
                    [
                        options.moba,
                        "train",
                        "-m",
                        last,
                        "--data",
                        data,
                        "--out",
                        out,
                        "--resume",
                        "--loss",
                        "completion",
                        "--steps",
                        stage.steps,
                        "--seq-len",
                        stage.seq_len,
                        "--batch-tokens",
                        stage.batch_tokens,
                        "--lr",
                        stage.lr,
                        "--moba-chunk-size",
                        stage.chunk,
                        "--moba-topk",
                        stage.top_k,
                        "--dtype",
                        "bf16",
                        "--seed",
                        options.seed,
                        "--save-every",
                        25,
                        "--threads",
                        options.threads,
                        *stage.options,
                    ],
                )
            ],
            check=True,
        )
        last = out
        if stage.name == options.until:
            return
    publish(last, options.out)


if __name__ == "__main__":
    sys.exit(main())
