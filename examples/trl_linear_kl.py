"""Distillation in TRL's SFTTrainer with `linear_kl`: KL(teacher ‖ student) on completion tokens, logits of neither model.

    pip install trl && python examples/trl_linear_kl.py

`LinearKLTrainer` is what to copy. The rest trains a small Llama with random weights for some steps.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from leaf.objective import Head, head_of, hidden_states, install
from leaf_kernels import linear_kl


class LinearKLTrainer(SFTTrainer):
    """SFTTrainer whose loss is the KL to a frozen teacher with the same tokenizer; padded, padding-free or packed."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        # model(objective=f, ...) returns f(hidden [B·T, H], head), inside the forward that DDP or FSDP wraps
        install(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Row i predicts token i + 1. Labels are -100 on prompts (the completion mask), on padding, and on the first token of
        # every sequence of a padding-free batch: no row predicts what begins the next one.
        next_labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        weight = (next_labels != -100).float()
        # The Trainer counts the labels of all micro-batches of the step, on all ranks (None: of this batch, in evaluation)
        divisor = weight.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        weight = weight / divisor.clamp(min=1)

        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = hidden_states(self.teacher, inputs)

        def kl(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            teacher = head_of(self.teacher)
            return linear_kl(
                hidden,
                head.weight,
                teacher_hidden,
                teacher.weight,
                token_weight=weight,
                vocab_size=len(self.processing_class),  # heads are padded, each model's to a size of its own
                student_bias=head.bias,
                teacher_bias=teacher.bias,
                student_softcap=head.softcap,
                teacher_softcap=teacher.softcap,
                student_logit_scale=head.logit_scale,
                teacher_logit_scale=teacher.logit_scale,
            ).loss

        loss = model(**inputs, objective=kl)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the ranks
        return (loss, None) if return_outputs else loss


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per number or word."""
    words = ["<pad>", "<eos>", "plus", "is", *map(str, range(100))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def rows() -> Dataset:
    """In TRL's prompt-completion format: the loss is then on completions only."""
    pairs = [(a, b) for a in range(4) for b in range(10, 14)]
    return Dataset.from_list([{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a, b in pairs])


def small_llama(seed: int, hidden_size: int, vocab_size: int) -> LlamaForCausalLM:
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


def main() -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        args = SFTConfig(
            output_dir,
            max_steps=10,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
        )
        trainer = LinearKLTrainer(
            model=small_llama(0, hidden_size=32, vocab_size=112),
            teacher=small_llama(1, hidden_size=64, vocab_size=128),
            args=args,
            train_dataset=rows(),
            processing_class=tokenizer(),
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    print(f"KL per completion token: {logs[0]['loss']:.3f} at the first step, {logs[-1]['loss']:.3f} at the last")


if __name__ == "__main__":
    main()
