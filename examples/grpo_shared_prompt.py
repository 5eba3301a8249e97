"""GRPO on one prompt: N completions in one pack that holds the prompt once, against the padded batch.

    python examples/grpo_shared_prompt.py

Both ways compute one policy-gradient step of a small Llama with random weights. They must agree in the loss of every
completion and in the gradient of every parameter; the exit status is 1 if they do not.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_kernels import SharedPrefixLayout, linear_cross_entropy
from leaf_kernels.integrations.transformers import packed_inputs, register

VOCABULARY = 1000
TOLERANCE = 1e-4  # of the largest entry of a gradient, in fp32


def rollouts() -> tuple[list[int], list[list[int]], torch.Tensor]:
    """A prompt, its completions as a sampler returns them, and their advantages."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    prompt, first = tokens(60), tokens(24)
    completions = [
        first,
        first[:5] + tokens(9),  # says the same for five tokens
        first[:5] + tokens(20),  # too, and then something else
        first[:-1] + tokens(1),  # differs in its last token only
        list(first),  # sampled twice
        *(tokens(n) for n in (17, 3, 1)),  # differ from the first token on
    ]
    rewards = torch.rand(len(completions), generator=generator)
    return prompt, completions, (rewards - rewards.mean()) / rewards.std()


def packed(
    model: LlamaForCausalLM, prompt: list[int], completions: list[list[int]], advantages: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Losses [N] of the completions and the number of tokens that the model sees; adds to the parameters' gradients."""
    # The first sequence is stored whole. Of every other one only what follows its longest common prefix with the first: the
    # prompt at least, and as much of the completion as is the same.
    layout, input_ids = SharedPrefixLayout.from_groups([[prompt + completion for completion in completions]])

    # The row that predicts a token is the one before it. For the first token in which a completion differs it lies in the
    # shared prefix, and completions that part there have different labels for it. `member_rows` finds it: it gives the rows
    # of a whole sequence in that sequence's order. Hence one entry per completion and token, not one per row.
    rows = torch.cat([layout.member_rows(m)[len(prompt) - 1 : -1] for m in range(len(completions))])
    labels = torch.tensor([token for completion in completions for token in completion])
    lengths = torch.tensor([len(completion) for completion in completions])

    # The loss of a completion is -advantage · (mean log-probability of its tokens), that of the step their mean. (GRPO clips
    # the ratio to the policy that sampled; at the first update the ratio is 1, and this is its gradient.)
    weight = (advantages / lengths / len(completions)).repeat_interleave(lengths)

    device = model.device
    layout, input_ids, rows, labels, weight = (x.to(device) for x in (layout, input_ids, rows, labels, weight))
    model.set_attn_implementation("leaf")
    hidden = model.model(**packed_inputs(layout, input_ids)).last_hidden_state[0]
    # Σ weight · (−log p) and every −log p, without logits: neither [tokens, vocabulary] nor a row nobody asked for
    loss, nll = linear_cross_entropy(hidden[rows], model.lm_head.weight, labels, token_weight=weight)
    loss.backward()
    losses = torch.stack([part.sum() for part in (weight * nll).split(lengths.tolist())])
    return losses, len(input_ids)


def padded(
    model: LlamaForCausalLM, prompt: list[int], completions: list[list[int]], advantages: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The same as trainers usually do it: a right-padded batch, the prompt in every row, full logits."""
    lengths = torch.tensor([len(completion) for completion in completions], device=model.device)
    longest = int(lengths.max())
    input_ids = torch.tensor([prompt + c + [0] * (longest - len(c)) for c in completions], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    attention_mask = torch.cat([torch.ones_like(input_ids[:, : len(prompt)]), mask.long()], dim=1)

    model.set_attn_implementation("sdpa")
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, len(prompt) - 1 : -1]
    log_p = logits.log_softmax(-1).gather(-1, input_ids[:, len(prompt) :, None]).squeeze(-1)
    losses = -advantages.to(model.device) * (log_p * mask).sum(1) / lengths / len(completions)
    losses.sum().backward()
    return losses.detach(), input_ids.numel()


def compare(
    model: LlamaForCausalLM, prompt: list[int], completions: list[list[int]], advantages: torch.Tensor
) -> tuple[dict[str, float], int, int]:
    """By how much losses and gradients differ, relative to their largest entry, and the tokens of both, padded first."""
    results = []
    for step in (padded, packed):
        model.zero_grad()
        losses, tokens = step(model, prompt, completions, advantages)
        results.append(({"losses": losses, **{name: p.grad for name, p in model.named_parameters()}}, tokens))
    (expected, tokens_padded), (actual, tokens_packed) = results
    differences = {name: float((actual[name] - x).abs().max() / x.abs().max()) for name, x in expected.items()}
    return differences, tokens_padded, tokens_packed


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # peaked distributions: a wrong row shows
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    register()  # makes attn_implementation="leaf" available
    prompt, completions, advantages = rollouts()
    differences, tokens_padded, tokens_packed = compare(small_llama(), prompt, completions, advantages)
    apart = sum(len(prompt) + len(completion) for completion in completions)
    print(f"{len(completions)} completions of a prompt of {len(prompt)} tokens")
    print(
        f"tokens: {tokens_padded} padded ({apart} without the padding), {tokens_packed} packed: "
        f"{1 - tokens_packed / tokens_padded:.0%} saved ({1 - tokens_packed / apart:.0%} of those without the padding)"
    )
    worst, difference = max(differences.items(), key=lambda item: item[1])
    print(f"largest relative difference: {difference:.1e} ({worst})")
    if not all(difference <= TOLERANCE for difference in differences.values()):  # NaN included
        sys.exit(f"packed and padded differ by more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
