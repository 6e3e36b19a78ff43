"""Small tokenizers of each kind."""

from __future__ import annotations

from typing import Any


def tokenizer(kind: str, *, bos: bool = False, eos: bool = False) -> Any:
    """Build a small tokenizer that knows the words of TEXT."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE, WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    if kind == "words":
        made = Tokenizer(WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(special_tokens=[*special, "<unk>"])
    elif kind == "bytes":
        made = Tokenizer(BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    else:
        made = Tokenizer(BPE())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        made.decoder = decoders.Metaspace(prepend_scheme=kind)
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    made.train_from_iterator(TEXT, trainer)
    before, after = ("<s> " if bos else ""), (" </s>" if eos else "")
    ids = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=ids)
    unknown = {"unk_token": "<unk>"} if kind == "words" else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **unknown)


TEXT = ["The capital of France is Paris and the capital of Italy is Rome and 8 is a number"] * 4
