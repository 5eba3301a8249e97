"""Distillation with `linear_kl` in a plain torch loop under FSDP2: the loss inside the sharded forward.

    torchrun --nproc-per-node 2 examples/fsdp2_linear_kl.py
    python examples/fsdp2_linear_kl.py

Both print the same losses: neither ranks nor micro-batches change a step. Small Llamas with random weights, student and
teacher both sharded; on GPUs with NCCL, else on CPUs with gloo.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_kernels import linear_kl

VOCABULARY = 1000
Example = tuple[list[int], list[int]]  # prompt, response
Batch = dict[str, torch.Tensor]


class Distillation(torch.nn.Module):
    """Σ KL(teacher ‖ student) over the response tokens of a batch.

    The loss is computed in this forward because this is the module that `fully_shard` gathers: inside, both heads are
    plain, whole tensors, gathered once, and the student's gets its gradient reduced. Read from outside they are shards:
    DTensors, which `linear_kl` refuses.
    """

    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM):
        super().__init__()
        self.student, self.teacher = student.train(), teacher.requires_grad_(False).eval()

    def forward(self, rows: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_hidden = self.teacher.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = self.student.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        # Models with a bias, a softcap or a scale of their logits: leaf.objective.head_of(model) has what to pass on
        student_head, teacher_head = self.student.lm_head.weight, self.teacher.lm_head.weight
        return linear_kl(hidden, student_head, teacher_hidden, teacher_head, rows=rows, vocab_size=VOCABULARY).loss


def shard(model: Distillation) -> None:
    """A group per decoder layer; embeddings, last norms and heads are the root's.

    In mixed precision every call takes `mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)`.
    """
    for each in (model.student, model.teacher):
        for layer in each.base_model.layers:
            fully_shard(layer)
    fully_shard(model)


def collate(examples: list[Example]) -> Batch:
    """Right-padded ids, and the rows [M] of the flattened batch [B·T] whose next token is one of a response."""
    length = max(len(prompt) + len(response) for prompt, response in examples)
    input_ids = torch.tensor([p + r + [0] * (length - len(p) - len(r)) for p, r in examples])
    sizes = torch.tensor([len(p) + len(r) for p, r in examples])
    attention_mask = (torch.arange(length) < sizes[:, None]).long()
    # Row i predicts token i + 1. Made on the CPU, where it costs no host sync
    rows = [torch.arange(len(p) - 1, len(p) + len(r) - 1) + n * length for n, (p, r) in enumerate(examples)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "rows": torch.cat(rows)}


def backward(model: Distillation, micro_batches: list[Batch], device: str = "cpu") -> torch.Tensor:
    """Gradients of one step, accumulated over this rank's micro-batches (as many on every rank). Returns the loss.

    The loss is the mean over the response tokens of all micro-batches of all ranks.
    """
    tokens = torch.tensor(float(sum(len(batch["rows"]) for batch in micro_batches)), device=device)
    dist.all_reduce(tokens)
    total = torch.zeros((), device=device)
    for n, batch in enumerate(micro_batches):
        model.set_requires_gradient_sync(n == len(micro_batches) - 1)
        loss = model(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}) / tokens
        # FSDP averages gradients over the ranks; this mean is over the tokens of all of them already
        (loss * dist.get_world_size()).backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total


def small_llama(seed: int, hidden_size: int, vocab_size: int) -> LlamaForCausalLM:
    """The same on every rank. Heads are padded, each to a size of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def random_examples(n: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    return [(tokens(10 + 3 * i), tokens(5 + 2 * i)) for i in range(n)]


def train(device: str) -> None:
    """Five steps on this rank's share of the examples, two to a micro-batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = Distillation(small_llama(0, 32, VOCABULARY), small_llama(1, 64, VOCABULARY + 24)).to(device)
    shard(model)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-2)
    share = random_examples(8)[rank::world_size]
    micro_batches = [collate(share[n : n + 2]) for n in range(0, len(share), 2)]
    for step in range(5):
        loss = backward(model, micro_batches, device)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: KL per response token {loss.item():.4f}")


def main() -> None:
    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    train(device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
