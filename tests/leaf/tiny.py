"""Tiny tokenizers and models, made on the spot: `from tiny import tokenizer, model` in any test of this folder."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CORPUS = (
    "Every day Tom doubles his $x$ coins. How many?",
    "Eva is 5 years old. Tom has 2 books. The sign says 9. Eva gives Tom 7 books. How many books does Tom have now?",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "2 plus 7 equals 9.\n\nThe answer is 9.\n#### 9",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
)

# The templates that matter: plain ChatML; one that trims and prints the date (Llama 3); one that puts an empty
# thinking block into the assistant turn (Qwen 3); one that refuses a system turn and renames the assistant (Gemma).
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}<|im_start|>system\nToday: "
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}<|im_end|>"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
}


def tokenizer(
    template: str | None = "chatml", *, corpus: Iterable[str] = CORPUS, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `corpus`, with one of `TEMPLATES` (or no chat template for None).

    Specials: `<|bos|>` (never added by itself), `<|im_start|>`, `<|im_end|>` (the end of sequence), `<|pad|>`.
    """
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_train(tuple(corpus), vocab_size)),
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = TEMPLATES[template] if template else None
    return result


@functools.lru_cache
def _train(corpus: tuple[str, ...], vocab_size: int) -> str:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return bpe.to_str()


@functools.lru_cache
def unigram(vocab_size: int = 150) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: ▁ for spaces and before the text, NFKC, `<unk>`, `<s>` before any text."""
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.normalizer = tokenizers.normalizers.NFKC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@functools.lru_cache
def ascii_only() -> PreTrainedTokenizerFast:
    """A tokenizer that leaves out what it does not know: one token per ASCII character, nothing for any other."""
    vocabulary = {"</s>": 0} | {chr(code): code for code in range(32, 127)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    arch: str = "llama",
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    attn_implementation: str = "eager",
    **overrides: object,
) -> PreTrainedModel:
    """A random causal model (fp32, eval mode) for `tokenizer`: arch llama, qwen2, gemma2, gpt2 or gpt_oss.

    `overrides` go to the config. Equal arguments give equal weights.
    """
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = {k: common[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e4}  # gpt-oss's own default is a long-context YaRN
    configs = {
        "llama": lambda: LlamaConfig(**{**common, **overrides}),
        "qwen2": lambda: Qwen2Config(**{**common, **overrides}),
        "gemma2": lambda: Gemma2Config(**{**common, "sliding_window": 16, "query_pre_attn_scalar": 8, **overrides}),
        "gpt2": lambda: GPT2Config(**{**ids, "n_embd": hidden, "n_layer": layers, "n_head": 4, **overrides}),
        "gpt_oss": lambda: GptOssConfig(
            **{
                **common,
                "num_local_experts": 2,
                "num_experts_per_tok": 2,
                "sliding_window": 16,
                "rope_parameters": rope,
                **overrides,
            }
        ),
    }
    config = configs[arch]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return result.float().eval()
