"""Trains a small Llama on several ranks, which share out the batch (data) and each row of it (context), with FSDP2.

    torchrun --nproc-per-node 4 examples/train_distributed.py --data-ranks 2 --context-ranks 2 --steps 100

Runs on the CPU (Gloo) or, with --device cuda, on GPUs (NCCL). The loss does not depend on the number of ranks but for
rounding, and a checkpoint continues on any number of ranks.
"""

import argparse
import json
from pathlib import Path

import moba
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from moba.distributed import ContextParallel, shard_batch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = 256  # the vocabulary


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path(__file__), help="a text; a byte is a token")
    add("--data-ranks", type=int, default=1, help="ranks that share out the batch")
    add("--context-ranks", type=int, default=1, help="ranks that share out a row")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--attn", default="moba", choices=("full", "moba"))
    add("--moba-chunk-size", type=int, default=16, help="tokens in a block")
    add("--moba-topk", type=int, default=3, help="blocks a token attends to")
    add("--layout", default="zigzag", choices=("contiguous", "zigzag"))
    add("--strategy", default="auto", choices=("auto", "fetch", "queries", "heads"))
    add("--batch", type=int, default=4, help="rows in a step")
    add("--tokens", type=int, default=128, help="tokens in a row")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=1e-3)
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of the log and of checkpoints")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--resume", type=Path, metavar="CHECKPOINT", help="a folder step-N of --out")
    return parser.parse_args(words)


def build(arguments: argparse.Namespace, mesh: DeviceMesh) -> LlamaForCausalLM:
    """Return the model, whose parameters are sharded over all ranks."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=arguments.tokens,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(arguments.device).train()
    moba.register_moba(
        moba.MoBAConfig(arguments.moba_chunk_size, arguments.moba_topk),
        context_parallel=ContextParallel(mesh["context"], arguments.layout, arguments.strategy),
    )
    model.set_attn_implementation("moba")
    everyone = DeviceMesh(arguments.device, mesh.mesh.flatten())
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    return model


def rows_of(text: torch.Tensor, step: int, arguments: argparse.Namespace) -> torch.Tensor:
    """Return the rows of a step, [batch, tokens], the same for any number of ranks."""
    generator = torch.Generator().manual_seed(arguments.seed + step)
    starts = torch.randint(len(text) - arguments.tokens, (arguments.batch,), generator=generator)
    return torch.stack([text[start : start + arguments.tokens] for start in starts.tolist()])


def train(arguments: argparse.Namespace) -> list[float]:
    """Train on the ranks of the default group; return the loss of every step."""
    mesh = init_device_mesh(
        arguments.device,
        (arguments.data_ranks, arguments.context_ranks),
        mesh_dim_names=("data", "context"),
    )
    model = build(arguments, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    first = load(model, optimizer, arguments.resume) if arguments.resume else 0
    text = torch.tensor(list(arguments.data.read_bytes()))
    losses = []
    for step in range(first, arguments.steps):
        rows = rows_of(text, step, arguments).chunk(arguments.data_ranks)
        rows = rows[mesh.get_local_rank("data")].to(arguments.device)
        batch = shard_batch({"input_ids": rows, "labels": rows}, mesh["context"], arguments.layout)
        with moba.mode(arguments.attn):
            loss = model(**batch, use_cache=False).loss
            loss.backward()  # FSDP averages the gradients over all ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        if arguments.out:
            report(step, losses[-1], arguments.out)
        if arguments.out and (step + 1) % arguments.save_every == 0:
            save(model, optimizer, step + 1, arguments.out / f"step-{step + 1}")
    return losses


def report(step: int, loss: float, folder: Path) -> None:
    """Append a step to the log."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.jsonl").open("a") as log:
            print(json.dumps({"step": step, "loss": loss}), file=log)


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load a checkpoint of any number of ranks; return its step."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["step"])


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    train(arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
