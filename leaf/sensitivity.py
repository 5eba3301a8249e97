"""The scoring engine: how much a frozen model's loss reacts to each token's embedding (E1), on packs that fit."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from leaf_kernels import SharedPrefixLayout, linear_cross_entropy
from leaf_kernels.integrations.transformers import NAME, check_model, register

from .data import Sample, Skip
from .generate import free_memory, is_out_of_memory
from .loading import decoder_layers
from .objective import Head, check_head, head_of, hidden_states

logger = logging.getLogger(__name__)

TILE_ROWS = {"cpu": 512, "cuda": 4096}  # of an MLP: enough that no product of matrices is slower for it


class HasTokens(Protocol):
    @property
    def input_ids(self) -> list[int]: ...


Item = TypeVar("Item", bound=HasTokens)


class Sensitivity(NamedTuple):
    """One model on one sample."""

    norm: torch.Tensor  # [n] fp32, ‖d loss / d embedding‖ at every position; only scored ones are meaningful
    loss: float  # mean cross-entropy of the response tokens, end of turn included
    nll: torch.Tensor | None  # [n] fp32, −log p of each scored token given what precedes it; None unless asked for


class Gradient(NamedTuple):
    """Of a pack of N tokens, on the model's devices."""

    embeddings: torch.Tensor  # [1, N, H], of the loss
    losses: torch.Tensor  # [N], what each row adds to it
    hidden: torch.Tensor  # [N, H]
    labels: torch.Tensor  # [N]
    layout: SharedPrefixLayout


def _options(head: Head) -> dict[str, Any]:
    return {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}


def sensitivities(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    perplexity: bool = False,
    activation_checkpointing: bool | None = None,
) -> Iterator[Sensitivity | Skip]:
    """E1 for one model, in order. Samples are packed, never mixed: the loss of a pack is the sum of its samples' means.

    No parameter ever has a gradient: weights are frozen and the loss is differentiated with respect to detached embeddings.
    Logits are never held for more than a chunk of the response rows. The model is left frozen, in eval mode and on
    `attn_implementation="leaf"`.

    What does not fit into memory is tried with checkpoints, then cut: a pack is halved down to single samples; a sample
    that does not fit alone is tried once more with its checkpoints in host memory (on a GPU); then it is a skip, `oom`.

    Args:
        max_tokens: budget of a pack; a longer sample gets a pack of its own.
        perplexity: also the −log p of each scored token.
        activation_checkpointing: None = for packs whose activations would take more memory than the model's weights; False
            = only where memory does not suffice.
    """
    scorer = Scorer(model, perplexity=perplexity, activation_checkpointing=activation_checkpointing)
    for pack in batches(samples, max_tokens):
        yield from scorer(pack)


def batches(items: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Consecutive items with at most `max_tokens` tokens together; a longer one gets a batch of its own."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + len(item.input_ids) > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item.input_ids)
    if batch:
        yield batch


class Scorer:
    """`sensitivities`, pack by pack.

    in_step: the ranks hold a share of each layer and call this equally often. Every pack is checkpointed, and one that does
    not fit is a MemoryError: a rank that cut it would leave the others waiting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        perplexity: bool = False,
        activation_checkpointing: bool | None = None,
        in_step: bool = False,
    ):
        register()
        check_model(model)
        model.set_attn_implementation(NAME)
        model.requires_grad_(False).eval()
        check_head(model)
        self.model, self.perplexity, self.head = model, perplexity, head_of(model)
        self.in_step = in_step
        activation_checkpointing = in_step or activation_checkpointing
        self.layers = decoder_layers(model)
        self.mlps = [layer.mlp for layer in self.layers] if _mlps_are_row_wise(model, self.layers) else []
        self.keeps = float("inf")  # activations of packs of up to so many tokens
        if self.layers and activation_checkpointing is not False:
            weights = sum(p.nbytes for p in model.parameters())
            self.keeps = 0 if activation_checkpointing else weights / activation_bytes_per_token(model)
        self.too_many = float("inf")  # tokens that did not fit though they were checkpointed, the fewest so far

    def __call__(self, batch: Sequence[Sample]) -> list[Sensitivity | Skip]:
        """Cuts a pack until it fits; what does not fit alone even with all that saves memory is skipped."""
        tokens = sum(len(sample.input_ids) for sample in batch)
        if tokens <= self.keeps:
            if result := self._try(batch, checkpoints=False):
                return result
            self.keeps = tokens - 1
        if self.layers and tokens < self.too_many:
            if result := self._try(batch, checkpoints=True):
                return result
            self.too_many = tokens
        if self.in_step:
            raise MemoryError(
                f"a pack of {tokens} tokens does not fit into memory beside a sharded teacher: give a smaller --max-tokens, "
                "or a smaller --max-length where a single row is that long"
            )
        if len(batch) > 1:
            half = len(batch) // 2
            return self(batch[:half]) + self(batch[half:])
        if self.layers and self.head.weight.is_cuda and (result := self._try(batch, checkpoints=True, offload=True)):
            return result
        return [Skip(batch[0].id, "oom", f"{tokens} tokens do not fit into memory, not even alone")]

    def _try(
        self, batch: Sequence[Sample], checkpoints: bool, offload: bool = False
    ) -> list[Sensitivity | Skip] | None:
        """None where memory does not suffice. checkpoints: with MLPs in tiles. offload: they wait in host memory."""
        try:
            with self.saving(checkpoints, offload):
                return list(self._measure(batch))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # not within the handler: there, the traceback still holds the activations
        return None

    @contextlib.contextmanager
    def saving(self, checkpoints: bool, offload: bool = False) -> Iterator[None]:
        """Inside, the model's layers keep less."""
        with contextlib.ExitStack() as stack:
            if checkpoints:
                for layer in self.layers[:-1]:  # the last one's backward needs its activations right away
                    stack.enter_context(_replaced(layer, _checkpointed))
                for mlp in self.mlps:
                    stack.enter_context(_replaced(mlp, _in_tiles))
            if offload:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=True))
            yield

    def gradient(self, batch: Sequence[Sample]) -> Gradient:
        """The forward and backward of a pack; reads no value back from the device."""
        model, head = self.model, self.head
        embed: Any = model.get_input_embeddings()
        near, far = embed.weight.device, head.weight.device  # two, where the model spans devices
        lengths = [len(s.input_ids) for s in batch]
        starts = itertools.accumulate(lengths, initial=0)
        layout = SharedPrefixLayout.from_lengths(lengths).to(near)
        input_ids = torch.tensor([i for s in batch for i in s.input_ids])
        # The last row of a sample would predict the next sample's first token: it is never used.
        labels = input_ids.roll(-1).to(far)

        # The row that predicts a token is the one before it.
        rows, weights = [], []
        for start, length, sample in zip(starts, lengths, batch):
            targets = length - sample.response_start
            rows.append(torch.arange(start + sample.response_start - 1, start + length - 1))
            weights.append(torch.full((targets,), 1 / targets))
        response_rows = torch.cat(rows)
        token_weight = torch.zeros(len(input_ids)).index_copy_(0, response_rows, torch.cat(weights)).to(far)

        embeddings = embed(input_ids.to(near)[None]).detach().requires_grad_()
        inputs = {"inputs_embeds": embeddings, "position_ids": layout.position_ids[None], "layout": layout}
        with torch.enable_grad(), contextlib.ExitStack() as stack:
            if self.mlps and not self.perplexity:  # only these rows of the last layer's MLP enter the loss
                stack.enter_context(_replaced(self.mlps[-1], functools.partial(_on_rows, rows=response_rows.to(far))))
            hidden = hidden_states(model, inputs).to(far)
            loss, per_token = linear_cross_entropy(
                hidden, head.weight, labels, token_weight=token_weight, rows=response_rows.to(far), **_options(head)
            )
            _return_freed_memory(near)
            (gradient,) = torch.autograd.grad(loss, embeddings)
        return Gradient(gradient, per_token * token_weight, hidden.detach(), labels, layout)

    def _measure(self, batch: Sequence[Sample]) -> Iterator[Sensitivity]:
        gradient, weighted, hidden, labels, layout = self.gradient(batch)
        head, lengths = self.head, [len(s.input_ids) for s in batch]
        starts = itertools.accumulate(lengths, initial=0)
        norm = torch.linalg.vector_norm(gradient[0], dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        nll = None
        if self.perplexity:
            prompt = torch.tensor([i for s in batch for i in s.scored])
            prompt_rows = (prompt & (layout.position_ids.cpu() > 0)).nonzero().squeeze(1) - 1
            with torch.no_grad():
                nll = linear_cross_entropy(
                    hidden, head.weight, labels, rows=prompt_rows.to(labels.device), **_options(head)
                )[1]
            nll = nll.roll(1).cpu()  # from the predicting row to the predicted token
        _return_freed_memory(gradient.device)
        losses = torch.stack([x.sum() for x in weighted.split(lengths)]).tolist()
        norm = norm.cpu()
        for i, (start, length) in enumerate(zip(starts, lengths)):
            here = slice(start, start + length)
            yield Sensitivity(norm[here], losses[i], None if nll is None else nll[here])


def activation_bytes_per_token(model: PreTrainedModel) -> float:
    """What the body keeps of a token for a backward to its embedding, without checkpoints; tried on a few tokens."""
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the graph that holds it, and with it the weights

    inputs = _few_tokens(model, 64)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_states(model, {"inputs_embeds": embeddings, **inputs})
    return sum(kept.values()) / len(hidden)


def _few_tokens(model: PreTrainedModel, n: int) -> dict[str, Any]:
    embeddings: Any = model.get_input_embeddings()
    layout = SharedPrefixLayout.from_lengths([n]).to(embeddings.weight.device)
    ids = layout.position_ids[None].long() % embeddings.num_embeddings
    return {"input_ids": ids, "position_ids": layout.position_ids[None], "layout": layout}


def _return_freed_memory(device: torch.device) -> None:
    """glibc keeps freed blocks of up to 32 MiB, which are most tensors on a CPU, in a heap with holes: 100 MiB and more
    that the larger blocks of a backward cannot use. GPUs have torch's own allocator."""
    glibc = sys.platform == "linux" and device.type == "cpu"
    if glibc and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


# -- Layers that keep less ---------------------------------------------------------------------------------------------

Forward = Callable[..., Any]


@contextlib.contextmanager
def _replaced(module: torch.nn.Module, by: Callable[..., Any]) -> Iterator[None]:
    """`module(...)` is `by(its forward, ...)`."""
    own = vars(module).get("forward")  # a hook's, or none: that of the class
    module.forward = functools.partial(by, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _checkpointed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Not `model.activation_checkpointing_enable()`: that works in train mode only, where a layer may drop out."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _on_rows(forward: Forward, x: torch.Tensor, *, rows: torch.Tensor) -> torch.Tensor:
    """Zeros but for `rows` of x [1, N, H]."""
    rows = rows.to(x.device)
    y = forward(x.index_select(1, rows))
    return y.new_zeros(*x.shape[:2], y.shape[2]).index_copy(1, rows, y)


def _in_tiles(forward: Forward, x: torch.Tensor) -> torch.Tensor:
    """Tile by tile, forward and backward: the widest activations of a layer exist for one tile at a time."""
    return _Tiled.apply(_Kept.apply(x), forward)  # type: ignore[no-any-return]


class _Kept(torch.autograd.Function):
    """x, kept for `_Tiled`. Being the last tensor that a layer saves, it is where recomputing a checkpointed layer stops:
    its MLP is then not computed a second time only for an output that nobody needs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Forward) -> torch.Tensor:
        ctx.kept, ctx.forward = x.grad_fn, forward
        return torch.cat([forward(tile[None]) for tile in x[0].split(TILE_ROWS[x.device.type])], 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (x,) = ctx.kept.saved_tensors
        result = torch.empty_like(x)
        rows = TILE_ROWS[x.device.type]
        for tile, upstream, out in zip(x[0].split(rows), gradient[0].split(rows), result[0].split(rows)):
            with torch.enable_grad():
                tile = tile[None].detach().requires_grad_()
                y = ctx.forward(tile)
            out.copy_(torch.autograd.grad(y, tile, upstream[None])[0][0])
        return result, None


@torch.no_grad()
def _mlps_are_row_wise(model: PreTrainedModel, layers: Sequence[Any]) -> bool:
    """Whether every layer's `mlp` takes each row by itself and nothing after the last mixes rows, tried on a few tokens."""
    mlps = [getattr(layer, "mlp", None) for layer in layers]
    if not mlps or not all(isinstance(mlp, torch.nn.Module) for mlp in mlps):
        return False
    inputs, rows = _few_tokens(model, 8), torch.tensor([2, 5, 7])
    equal: list[bool] = []

    def both_ways(forward: Forward, x: torch.Tensor) -> torch.Tensor:
        y = forward(x)
        equal.append(_equal(_on_rows(forward, x, rows=rows)[0, rows], y[0, rows]))
        return y

    try:
        with contextlib.ExitStack() as stack:
            for mlp in mlps:
                stack.enter_context(_replaced(mlp, both_ways))  # type: ignore[arg-type]
            whole = hidden_states(model, inputs)
        with _replaced(mlps[-1], functools.partial(_on_rows, rows=rows)):  # type: ignore[arg-type]
            part = hidden_states(model, inputs)
    except (TypeError, AttributeError, RuntimeError) as error:  # it returns or takes something else than rows
        logger.info("%s: MLPs are computed on all rows: %s", type(model).__name__, error)
        return False
    return all(equal) and _equal(part[rows], whole[rows])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the rounding of matrix products of other sizes."""
    return bool((a - b).float().norm() <= 8 * torch.finfo(b.dtype).eps * b.float().norm())
