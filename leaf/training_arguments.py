"""`LeafArguments`: transformers' TrainingArguments and the parameters of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LeafArguments(TrainingArguments):
    """transformers' TrainingArguments and the parameters of the LeaF objective (E7).

    `per_device_train_batch_size × gradient_accumulation_steps × world size` counts *groups* (an original and its
    counterfactuals). Loss and gradients depend on that product, never on how it is cut.
    """

    lambda_: float = field(default=0.5, metadata={"help": "weight λ of the originals; 1 − λ on the counterfactuals"})
    loss_mode: str = field(
        default="pair", metadata={"help": "pair: λ·L_kd + (1−λ)·L_cd; concat: one mean over all tokens"}
    )
    temperature: float = field(default=1.0, metadata={"help": "softmax temperature t; the loss carries t²"})
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl or jsd"})
    beta: float | None = field(default=None, metadata={"help": "β of jsd"})
    ce_weight: float = field(default=0.0, metadata={"help": "weight of the cross-entropy on the same rows"})
    max_tokens: int = field(default=16384, metadata={"help": "tokens per pack; a larger group gets a pack of its own"})
    counterfactuals_per_sample: str = field(
        default="1", metadata={"help": "counterfactuals of a row per epoch, cycled; 'all' uses every one in each epoch"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "groups are dicts of lists: nothing to remove"}
    )
    label_names: list[str] | None = field(default_factory=list, metadata={"help": "targets are part of the packs"})
    # A NaN that is left out of the logged loss has still reached the weights: we stop at it instead.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "see NonFiniteLoss"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "the paper's schedule"})
    learning_rate: float = field(default=1e-5, metadata={"help": "the paper's learning rate"})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "trackers, as in transformers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(f"lambda_ must lie in [0, 1], got {self.lambda_}")
        if self.loss_mode not in ("pair", "concat"):
            raise ValueError(f"loss_mode must be 'pair' or 'concat', got {self.loss_mode!r}")
        each = str(self.counterfactuals_per_sample)
        if each != "all" and not (each.isdigit() and int(each) > 0):
            raise ValueError(f"counterfactuals_per_sample must be a positive number or 'all', got {each!r}")
        if self.train_sampling_strategy not in ("random", "sequential") or self.dataloader_drop_last:
            raise ValueError(
                "LeafTrainer samples groups itself: train_sampling_strategy must be 'random' or 'sequential' and "
                f"dataloader_drop_last False, got {self.train_sampling_strategy!r} and {self.dataloader_drop_last}"
            )
