"""A small tokenizer of every kind, trained on the same few texts."""

import copy
import functools
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("wordpiece", "bytes", "ends", "unigram")
_SYLLABLES = ("ba", "lo", "ki", "ster", "ing", "un", "re", "mo", "thal", "ce")


def _texts():
    draw = random.Random(0)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(60)]


TEXTS = _texts()
"""Sentences of made-up words that share their syllables."""


def _wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])  # behind all others
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
    return tokenizer, names


def _bytes():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer, {"eos": "<end>", "pad": "<end>"}


def _ends():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=["<unk>"], end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = [(t, tokenizer.token_to_id(t)) for t in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends)
    return tokenizer, {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "</s>"}


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer, {"unk": "<unk>", "eos": "</s>", "pad": "<pad>"}


_MAKERS = {"wordpiece": _wordpiece, "bytes": _bytes, "ends": _ends, "unigram": _unigram}


@functools.cache
def _made(kind):
    tokenizer, names = _MAKERS[kind]()
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make(kind):
    """A tokenizer of one of `KINDS`: a BPE of bytes, one that marks ends of words, and others."""
    return copy.deepcopy(_made(kind))
