"""Batches without padding on `attn_implementation="leaf"`: by hand, and in a Trainer with a padding-free collator.

    python examples/padding_free.py

A small Llama with random weights. The exit status is 1 if the pack's hidden states are not those of the sequences alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from leaf.objective import Head, install
from leaf_kernels import SharedPrefixLayout, linear_cross_entropy
from leaf_kernels.integrations.transformers import check_model, packed_inputs, register

VOCABULARY = 1000
TOLERANCE = 1e-5  # of the largest hidden state, in fp32


def packed_hidden(model: LlamaForCausalLM, sequences: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Last hidden states [length, H] of each sequence, from one forward over all tokens and no padding."""
    lengths = [len(sequence) for sequence in sequences]
    layout = SharedPrefixLayout.from_lengths(lengths).to(model.device)
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=model.device)
    return model.base_model(**packed_inputs(layout, input_ids)).last_hidden_state[0].split(lengths)


def with_layout(collator: Callable[[list], dict]) -> Callable[[list], dict]:
    """A padding-free collator that says where sequences begin with a layout, in place of FlashAttention's arguments.

    `collator` returns `input_ids`, `position_ids` and `labels` as a batch of one: transformers'
    DataCollatorWithFlattening, or TRL's DataCollatorForLanguageModeling(pad_token_id=..., padding_free=True).
    """

    def collate(examples: list) -> dict:
        batch = collator(examples)
        # Positions begin again with every sequence. Here, on the CPU, finding where costs no host sync.
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()
        layout = SharedPrefixLayout(F.pad(starts, (0, 1), value=batch["position_ids"].shape[1]))
        return {**packed_inputs(layout, batch["input_ids"][0]), "labels": batch["labels"]}

    return collate


class PaddingFreeTrainer(Trainer):
    """Cross-entropy without logits. (A plain Trainer with the same collator computes the same loss from logits.)"""

    def __init__(self, model: LlamaForCausalLM, **kwargs: Any):
        register()  # makes attn_implementation="leaf" available
        check_model(model)  # raises if a pack of this model would not equal its separate sequences
        model.set_attn_implementation("leaf")
        install(model)  # model(objective=f, ...) returns f(hidden, head), inside the forward that DDP or FSDP wraps
        super().__init__(model, data_collator=with_layout(DataCollatorWithFlattening()), **kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Row i predicts token i + 1. The first label of every sequence is -100: no row predicts what begins the next one.
        next_labels = F.pad(inputs["labels"][0, 1:], (0, 1), value=-100)
        weight = (next_labels != -100).float()
        # The Trainer counts the labels of all micro-batches of the step, on all ranks (None: of this batch, in evaluation)
        divisor = weight.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        weight = weight / divisor.clamp(min=1)

        def cross_entropy(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            return linear_cross_entropy(
                hidden,
                head.weight,
                next_labels,
                token_weight=weight,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            ).loss

        pack = {name: value for name, value in inputs.items() if name != "labels"}
        loss = model(**pack, objective=cross_entropy)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the ranks
        return (loss, None) if return_outputs else loss


def random_sequences(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (5 + 7 * i,), generator=generator).tolist() for i in range(n)]


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    model, sequences = small_llama(), random_sequences(8)
    with torch.no_grad():
        alone = [model.base_model(torch.tensor([s], device=model.device)).last_hidden_state[0] for s in sequences]
        register()
        model.set_attn_implementation("leaf")
        packed = packed_hidden(model, sequences)
    difference = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(packed, alone, strict=True))
    tokens, longest = sum(map(len, sequences)), max(map(len, sequences))
    print(f"{tokens} tokens in the pack, {longest * len(sequences)} in a padded batch")
    print(f"largest relative difference to the sequences alone: {difference:.1e}")

    with tempfile.TemporaryDirectory() as output_dir:
        args = TrainingArguments(
            output_dir,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": sequence} for sequence in sequences]  # "labels" too, where prompts are masked with -100
        trainer = PaddingFreeTrainer(model, args=args, train_dataset=data)
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"cross-entropy per token: {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
    if not difference <= TOLERANCE:  # NaN included
        sys.exit(f"the pack and the sequences alone differ by more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
