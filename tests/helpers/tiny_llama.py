"""The tiny Llama and the dataset ``weather`` that most tests measure, and the imports of forked processes."""

from __future__ import annotations

from pathlib import Path

TOWNS = ("Bonn", "Jena", "Kiel", "Ulm")

ASK = {"ask": "Answer:", "answers": "no,yes"}
"""A question about the texts, so that runs have zero-shot answers."""

ASK_OPTIONS = tuple(word for option, value in ASK.items() for word in (f"--{option}", value))


def make_tiny_model(folder: Path) -> Path:
    """A folder for ``--model``: a Llama of 2 layers × 16, and a tokenizer of 256 bytes. It reads 128 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # The vocabulary is an alphabet and nothing is merged: so every text has tokens, and none is unknown.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,  # the usual 0.02 leaves states so small that an L2 probe ignores them
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weather(n: int) -> str:
    rows = (
        f"Day {i}: rain in {TOWNS[i // 2 % 4]}{'!' if i % 2 else '.'},{i % 2},{TOWNS[i // 2 % 4]} {i // 8}"
        for i in range(n)
    )
    return "\n".join(["text,label,town", *rows]) + "\n"


def preload() -> list[str]:
    """Names of the modules that an ingesting process imports, and of those that test modules import."""
    return [
        *("pytest", "hypothesis"),
        *(
            "kdb.cli",
            "kdb.warehouse.store",
            "kdb.ingest.concept.study",
            "kdb.ingest.concept.probes",
            "kdb.ingest.forward.capture",
        ),
        *("kdb.cli.keep", "kdb.cli.share", "kdb.warehouse.imports", "kdb.warehouse.compaction"),
        *("torch", "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers"),
    ]
