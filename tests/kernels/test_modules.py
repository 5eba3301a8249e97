"""The modules are their ops: order of arguments, masks, means, leading shapes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from leaf_kernels import LinearCrossEntropyLoss, LinearKLLoss, linear_kl

B, T, DS, DT, V = 2, 5, 6, 4, 11


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"sh": (B, T, DS), "sw": (V, DS), "th": (B, T, DT), "tw": (V, DT), "sb": (V,), "tb": (V,)}
    made = {name: torch.randn(*shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :3] = labels[1, 4] = -100
    return {**made, "labels": labels}


def plain(x: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """[B, T], forward KL from full logits."""
    s, t = (
        F.log_softmax(F.linear(x[h], x[w], x[b]) / temperature, -1)
        for h, w, b in (("sh", "sw", "sb"), ("th", "tw", "tb"))
    )
    return temperature**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(-1)


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [True, False])
def test_kl_is_the_mean_or_sum_over_unmasked_tokens(masked, reduction):
    x = inputs()
    leaves = [x[n].requires_grad_() for n in ("sh", "sw", "sb")]
    x["th"].requires_grad_()  # detached by the module, as in Liger
    labels = x["labels"] if masked else None
    loss = LinearKLLoss(temperature=2.0, reduction=reduction)(
        x["sh"], x["sw"], x["th"], x["tw"], labels, x["sb"], x["tb"]
    )
    every = plain(x, 2.0)
    kept = every[x["labels"] != -100] if masked else every.flatten()
    expected = getattr(kept, reduction)()
    assert loss.ndim == 0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, *leaves), gradients(expected, *leaves))
    assert x["th"].grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_torchs(reduction):
    x = inputs()
    leaves = [x[n].requires_grad_() for n in ("sh", "sw", "sb")]
    loss = LinearCrossEntropyLoss(reduction=reduction)(x["sw"], x["sh"], x["labels"], x["sb"])
    expected = F.cross_entropy(
        F.linear(x["sh"], x["sw"], x["sb"]).flatten(0, 1), x["labels"].flatten(), reduction=reduction
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, *leaves), gradients(expected, *leaves))


def test_one_row_per_token_needs_no_leading_shape():
    x = inputs()
    flat = LinearKLLoss()(x["sh"].flatten(0, 1), x["sw"], x["th"].flatten(0, 1), x["tw"], x["labels"].flatten())
    torch.testing.assert_close(LinearKLLoss()(x["sh"], x["sw"], x["th"], x["tw"], x["labels"]), flat, rtol=0, atol=0)


def test_nothing_to_average_is_zero_with_zero_gradients():
    x = inputs()
    x["labels"].fill_(-100)
    leaves = [x[n].requires_grad_() for n in ("sh", "sw")]
    for loss in (
        LinearKLLoss()(x["sh"], x["sw"], x["th"], x["tw"], x["labels"]),
        LinearCrossEntropyLoss()(x["sw"], x["sh"], x["labels"]),
        LinearKLLoss()(x["sh"][:, :0], x["sw"], x["th"][:, :0], x["tw"]),
    ):
        assert loss == 0
        assert all(not g.any() for g in gradients(loss, *leaves))


KL_OPTIONS = {
    "temperature": 0.5,
    "divergence": "jsd",
    "beta": 0.3,
    "vocab_size": 7,
    "student_softcap": 2.0,
    "teacher_softcap": 3.0,
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 0.25,
    "chunk_rows": 2,
    "impl": "reference",
}


@pytest.mark.parametrize("name", [*KL_OPTIONS, None])
def test_options_reach_linear_kl(name, monkeypatch):
    """All at once against the op, and one by one by what the op is called with."""
    from leaf_kernels import modules

    seen = {}

    def recorded(*args, **options):
        seen.update(options)
        return linear_kl(*args, **options)

    monkeypatch.setattr(modules, "linear_kl", recorded)
    x = inputs()
    options = KL_OPTIONS if name in (None, "divergence", "beta") else {name: KL_OPTIONS[name]}
    got = LinearKLLoss(**options, reduction="sum")(x["sh"], x["sw"], x["th"], x["tw"])
    assert {n: seen[n] for n in options} == options
    torch.testing.assert_close(
        got, linear_kl(x["sh"].flatten(0, 1), x["sw"], x["th"].flatten(0, 1), x["tw"], **options)[0]
    )


@pytest.mark.parametrize(
    ("options", "logits"),
    [
        ({"softcap": 2.0}, lambda z: 2 * torch.tanh(z / 2)),
        ({"logit_scale": 0.5}, lambda z: 0.5 * z),
        ({"vocab_size": 7}, lambda z: z[..., :7]),
        ({"chunk_rows": 2, "impl": "reference"}, lambda z: z),
    ],
    ids=["softcap", "scale", "vocabulary", "chunks"],
)
def test_options_reach_linear_cross_entropy(options, logits):
    x = inputs()
    labels = x["labels"].clamp(max=6)
    expected = F.cross_entropy(logits(x["sh"] @ x["sw"].T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(LinearCrossEntropyLoss(**options)(x["sw"], x["sh"], labels), expected)


def test_modules_have_no_state_and_print_their_options():
    for module in (LinearKLLoss(temperature=2.0), LinearCrossEntropyLoss(softcap=30.0)):
        assert not module.state_dict()
        assert repr(copy.deepcopy(module)) == repr(module)
    assert "temperature=2.0" in repr(LinearKLLoss(temperature=2.0))
    assert "softcap=30.0" in repr(LinearCrossEntropyLoss(softcap=30.0))


def test_bad_reductions_and_shapes_are_named():
    with pytest.raises(ValueError, match="LinearKLLoss: reduction must be 'mean' or 'sum', got 'none'"):
        LinearKLLoss(reduction="none")
    x = inputs()
    kl, cross_entropy = LinearKLLoss(), LinearCrossEntropyLoss()
    with pytest.raises(ValueError, match=r"LinearKLLoss: shift_labels must have shape \(2, 5\)"):
        kl(x["sh"], x["sw"], x["th"], x["tw"], x["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"LinearKLLoss: teacher_hidden must have shape \(2, 5, 4\)"):
        kl(x["sh"], x["sw"], x["th"].transpose(0, 1), x["tw"])
    with pytest.raises(ValueError, match=r"LinearCrossEntropyLoss: labels must have shape \(2, 5\)"):
        cross_entropy(x["sw"], x["sh"], x["labels"].T)
    with pytest.raises(TypeError, match=r"shift_labels must be labels, .* got torch.bool; .* torch.where"):
        kl(x["sh"], x["sw"], x["th"], x["tw"], x["labels"] != -100)
    with pytest.raises(TypeError, match=r"positional"):
        LinearKLLoss(0.5)  # Liger's first option is jsd_beta


def test_compiles_whole():
    x = inputs(torch.float32)
    loss = LinearKLLoss()
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(x["sh"], x["sw"], x["th"], x["tw"])
    torch.testing.assert_close(got, loss(x["sh"], x["sw"], x["th"], x["tw"]))
