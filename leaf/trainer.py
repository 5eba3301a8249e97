"""`LeafTrainer`: distillation on originals and counterfactuals with transformers' Trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput

from leaf_kernels.integrations.transformers import NAME, check_model, register

from .card import model_card
from .checkpoint import FILES, vouch
from .checks import check_arguments, check_cache, check_shards, refuse_attention_dropout, refuse_without_values, settle
from .metrics import Interval
from .objective import Distillation, Head, check_head, coefficients, distillation, head_of, hidden_states, install
from .pack import Collator, Group, GroupDataset, GroupSampler, GroupStream
from .teacher import TeacherCache
from .training_arguments import LeafArguments

logger = logging.getLogger(__name__)


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite; raised before the optimizer sees its gradient."""


class LeafTrainer(Trainer):
    """Distils `teacher` into `model` on groups of originals and counterfactuals.

    Args:
        model: the student, or a peft model with adapters on its body. It stays what it is: every checkpoint loads with plain
            `from_pretrained`, that of a peft model holds its adapters. Both models are set to
            `attn_implementation="leaf"`; before `generate()`, call `model.set_attn_implementation("sdpa")`.
        teacher: a model, which this call freezes and moves to the training device, unless it is quantized, spread by a
            `device_map` or sharded over the ranks (`leaf.loading`); or a `leaf.teacher.TeacherCache` of its answers.
        train_dataset, eval_dataset: groups (see `leaf.pack`), a sequence or an iterable; an iterable without a length needs
            `max_steps` and is read again from its start when it ends.
        vocab_size: distil on the first `vocab_size` columns of both heads. Default: all, where the heads have the same size;
            the smaller size otherwise (padded embeddings). Compare the tokenizers first (`leaf.data.check_pair`).

    `evaluate()` returns eval_loss, eval_kl_original and eval_kl_counterfactual: means over all response tokens of the data
    set, with every counterfactual, whatever the packs and ranks. eval_loss is E7, without `ce_weight`.
    """

    args: LeafArguments
    loss_is_scaled_for_ga = True  # divided by the weights of the whole accumulation window
    _unchecked: Any = 0.0  # sum of the losses of this step that nobody has looked at yet

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | TeacherCache,
        args: LeafArguments,
        train_dataset: Sequence[Group] | Iterable[Group] | None = None,
        eval_dataset: Sequence[Group] | Iterable[Group] | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("data_collator") is not None:
            raise ValueError("LeafTrainer packs groups itself: data_collator cannot be replaced")
        check_arguments(args, spread_teacher=hasattr(teacher, "hf_device_map"))
        register()
        student: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
        self.answers = teacher if isinstance(teacher, TeacherCache) else None
        online = None if isinstance(teacher, TeacherCache) else teacher
        for role, each in {"student": student, "teacher": online}.items():
            if each is not None:
                refuse_without_values(each, role)
                check_model(each)
                head_of(each)
                each.set_attn_implementation(NAME)
        refuse_attention_dropout(student)
        if self.answers is not None:
            check_cache(self.answers, args.divergence, args.temperature, vocab_size)
        install(student)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(
                args.max_tokens,
                concat=args.loss_mode == "concat",
                rank=args.process_index,
                ranks=args.world_size,
                answers=self.answers,
            ),
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            **kwargs,
        )
        self.interval = Interval(self.accelerator)
        self.add_callback(self.interval)
        check_shards(self)
        check_head(student)
        self.teacher = None if online is None else settle(online, args.device)
        head = head_of(online) if self.answers is None else self.answers.head  # type: ignore[arg-type]
        # In the dtype that the student's head will have, cast once, not once per pack
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}  # asked for here or by the launcher
        dtype = mixed.get(self.accelerator.mixed_precision, head_of(student).weight.dtype)
        self.teacher_head = head and Head(
            *(t.to(args.device, dtype) if isinstance(t, torch.Tensor) else t for t in head)  # type: ignore[arg-type]
        )
        # Columns of the student's and of the teacher's head
        columns = len(head.weight) if head else self.answers.vocab_size  # type: ignore[union-attr]
        self.head_sizes = len(head_of(student).weight), columns
        same = self.head_sizes[0] == self.head_sizes[1]
        self.vocab_size = vocab_size if vocab_size is not None or same else min(self.head_sizes)
        if narrow := {p.dtype for p in student.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}:
            logger.warning(
                "trained weights of the student are %s: at small learning rates most updates round to nothing; load it with "
                "dtype=torch.float32 (adapters: leave peft's autocast_adapter_dtype on) and train with bf16=True",
                " and ".join(map(str, narrow)),
            )

        for dataset in (train_dataset, eval_dataset):
            if self.answers is not None and isinstance(dataset, Sequence):
                self.answers.check(dataset)

    # -- data ------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("LeafTrainer: training needs train_dataset, a sequence or an iterable of groups")
        args = self.args
        count = str(args.counterfactuals_per_sample)
        return self._loader(self.train_dataset, args.per_device_train_batch_size, count, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        if dataset is None:
            raise ValueError("LeafTrainer: evaluation needs eval_dataset, a sequence or an iterable of groups")
        return self._loader(dataset, self.args.per_device_eval_batch_size, "all", training=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, dataset: Any, batch_size: int, count: str, training: bool) -> DataLoader:
        """Dealt to the ranks by our own collator: accelerate's samplers repeat samples that do not divide by the ranks."""
        args = self.args
        batch_size *= args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        common: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            if args.dataloader_num_workers:
                raise ValueError(
                    "LeafTrainer: a stream is read in order by the main process: set dataloader_num_workers=0, got "
                    f"{args.dataloader_num_workers}"
                )
            stream = GroupStream(dataset, batch_size, seed, count, repeat=training)
            return DataLoader(stream, batch_size=None, **common)
        if len(dataset) == 0:
            raise ValueError("LeafTrainer: the data set has no groups")
        shuffle = training and args.train_sampling_strategy == "random"
        sampler = GroupSampler(len(dataset), batch_size, seed, shuffle)
        return _Loader(GroupDataset(dataset, seed, count), batch_sampler=sampler, **common)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return send_to_device(inputs, self.args.device, non_blocking=True)

    # -- loss ------------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """(N_o, N_c): the weights of the whole optimiser step, over all ranks."""
        packs = [pack for batch in batch_samples for pack in batch["packs"]]
        sums = [[pack[w].double().sum() for w in ("weight_original", "weight_counterfactual")] for pack in packs]
        counts = torch.tensor(sums, dtype=torch.float64).sum(0).to(device)
        return self.accelerator.reduce(counts, "sum")

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward per pack; DDP synchronises gradients with the last one only.

        FSDP2 would keep whole gradients until then: there each pack's are divided among the ranks at once.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=self.args.device)
        for pack in inputs["packs"]:
            waits = pack is not inputs["packs"][-1]
            context = accelerator.no_sync(model) if waits and not accelerator.is_fsdp2 else contextlib.nullcontext()
            with context, self._steps(not waits):
                super().training_step(model, pack, num_items_in_batch)
            total += self._pack_loss
        return total

    @contextlib.contextmanager
    def _steps(self, steps: bool) -> Iterator[None]:
        """DeepSpeed takes its step inside the backward: with the last pack of a step only."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(before and steps)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The pack's share of E7 over the whole step; times the ranks, because their gradients are averaged."""
        coefficient = self._coefficients(num_items_in_batch)
        loss, result = self._distil(model, inputs, coefficient)
        self._unchecked = self._unchecked + result.loss.detach()
        if self.accelerator.sync_gradients:  # with the last pack of a step: the host waits for the device once
            if not torch.isfinite(self._unchecked):
                raise NonFiniteLoss(
                    f"the loss is {self._unchecked.item()} at step {self.state.global_step}; nothing was updated with it. "
                    "Lower the learning rate, check the data of this step, or train with bf16=True instead of fp16"
                )
            self._unchecked = 0.0
        self.interval.add(inputs, result)
        self._pack_loss = result.loss.detach().float() * self.args.world_size
        loss = loss * self.args.world_size
        return (loss, result) if return_outputs else loss

    def _coefficients(self, counts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return coefficients(counts.float(), self.args.lambda_, concat=self.args.loss_mode == "concat")

    def _distil(
        self, model: torch.nn.Module, pack: dict[str, Any], coefficient: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, Distillation]:
        """The loss to differentiate, which the wrapped forward has returned and may have rounded; and the result."""
        args = self.args
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "layout")}
        teacher_hidden = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_hidden = hidden_states(self.teacher, inputs).to(args.device)
        objective = distillation(
            pack,
            teacher_hidden,
            self.teacher_head,
            coefficient,
            temperature=args.temperature,
            divergence=args.divergence,
            beta=args.beta,
            ce_weight=args.ce_weight if model.training else 0.0,
            vocab_size=self.vocab_size,
        )
        results: list[Distillation] = []

        def loss_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            results.append(objective(hidden, head))
            return results[-1].loss

        return model(**inputs, objective=loss_of), results[-1]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(LeafTrainer, self).floating_point_ops(pack) for pack in inputs["packs"])

    # -- log -------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A log of the training loss also has what `leaf.metrics` says of the interval."""
        if "loss" in logs:
            logs |= self.interval.close()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.interval.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.interval.paused():
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override]
        """Writes README.md into `output_dir`. metadata: see `transformers.Trainer.create_model_card`; `tasks`, `dataset` and
        `dataset_args` describe evaluations and are not used."""
        if self.is_world_process_zero():
            known = {name: metadata.get(name) for name in ("tags", "language", "license", "model_name")}
            known |= {"student": metadata.get("finetuned_from"), "datasets": metadata.get("dataset_tags")}
            model_card(self, **known).save(Path(str(self.args.output_dir)) / "README.md")  # type: ignore[arg-type]

    # -- evaluation ------------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Token-weighted global means, summed in fp64 over packs and ranks."""
        args = self.args
        model = self._evaluated_model()
        # Σ KL and Σ weight, original and counterfactual; sequences
        sums = torch.zeros(5, dtype=torch.float64, device=args.device)
        one = torch.ones((), device=args.device)
        autocast = (
            self.accelerator.autocast if model is self.model and not self.is_fsdp_enabled else contextlib.nullcontext
        )
        for batch in dataloader:
            for pack in map(self._prepare_inputs, batch["packs"]):
                with torch.no_grad(), autocast():
                    _, result = self._distil(model, pack, (one, one))
                kl = torch.stack([result.kl_original, result.kl_counterfactual]).double()
                weight = torch.stack([pack[w].double().sum() for w in ("weight_original", "weight_counterfactual")])
                sequences = pack["layout"].num_segments if len(pack["rows"]) else 0
                sums += torch.cat([kl, weight, weight.new_tensor([sequences])])
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        sums = self.accelerator.reduce(sums, "sum")
        kl, counts, samples = sums[:2], sums[2:4], sums[4]
        means = kl / counts.clamp_min(1e-30)
        loss = (torch.stack(self._coefficients(counts)) * kl).sum()
        names = ("loss", "kl_original", "kl_counterfactual")
        values = dict(zip(names, torch.cat([loss[None], means]).tolist()))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(samples))  # type: ignore[arg-type]

    def _evaluated_model(self) -> Any:
        """The wrapped model. One that was not trained is prepared here for FSDP and DeepSpeed, as by the Trainer's own loop;
        for DDP it is left alone: accelerate would take it for wrapped when training follows."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
        model: Any = self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
        if model is self.model and not self.accelerator._models:
            if self.is_fsdp_enabled:  # FSDP2 is prepared with an optimizer or not at all
                model, _ = self.accelerator.prepare(model, torch.optim.SGD(self.model.parameters()))
                self.accelerator._optimizers.clear()
                self.model = self.model_wrapped = model
            elif self.is_deepspeed_enabled:
                self.deepspeed = self.model_wrapped = model = self.accelerator.prepare(model)
        return model.eval()

    # -- saving ----------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model, for plain `from_pretrained`; also where checkpoints are sharded, of which the Trainer saves none.

        Collective: every rank calls it.
        """
        if _internal_call and self.args.should_save:  # a checkpoint is written anew
            (Path(output_dir or str(self.args.output_dir)) / FILES).unlink(missing_ok=True)
        if self.is_fsdp_enabled and not _internal_call:
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last file of each rank. The Trainer waits for none before it removes older checkpoints."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            vouch(Path(output_dir))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Resumed from its last step in the midst of an epoch, the Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True


class _Loader(DataLoader):
    """A DataLoader that passes the epoch on, under the name that the Trainer looks for."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
