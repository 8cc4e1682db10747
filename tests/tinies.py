"""A small model of every family, what it eats and what it gives. Tests read it through conftest."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 99
LENGTHS = (9, 6, 4, 7)
PATCHES = 10
"""Tokens of an image: 9 patches and one for the class."""
FRAMES = 12
"""Positions of Whisper's encoder: half as many as spectrogram frames."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 140,
}
_BERT = {**_SIZES, "num_labels": 3}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, **_SPECIAL}
_EXPERTS = {**_LLAMA, "experts_implementation": "eager"}
_IMAGE = {"image_size": 12, "patch_size": 4, "num_labels": 3}
_PARTS = {k: v for k, v in _SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
_CLIP_TEXT = {**_SIZES, **_SPECIAL, "projection_dim": 16}
_CLIP_VISION = {**_PARTS, "image_size": 12, "patch_size": 4, "projection_dim": 16}
_GEMMA3 = {**_LLAMA, "head_dim": 8, "sliding_window": 5, "layer_types": None}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    **_SPECIAL,
}


def _deberta() -> Any:
    return hf.DebertaV2Config(
        **_BERT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        type_vocab_size=0,
    )


def _gemma3() -> Any:
    vision = {**_PARTS, "image_size": 12, "patch_size": 4}
    return hf.Gemma3Config(
        text_config=_GEMMA3, vision_config=vision, mm_tokens_per_image=9, **_SPECIAL
    )


TINY: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**_BERT),
    "roberta": lambda: hf.RobertaConfig(**_BERT, pad_token_id=1),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**_BERT, pad_token_id=1),
    "camembert": lambda: hf.CamembertConfig(**_BERT, pad_token_id=1),
    "electra": lambda: hf.ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=140,
        num_labels=3,
    ),
    "albert": lambda: hf.AlbertConfig(
        **{**_BERT, "num_hidden_layers": 3}, embedding_size=16, num_hidden_groups=2
    ),
    "mpnet": lambda: hf.MPNetConfig(**_BERT, pad_token_id=1),
    "deberta-v2": _deberta,
    "modernbert": lambda: hf.ModernBertConfig(
        **_BERT, **_SPECIAL, global_attn_every_n_layers=2, local_attention=6
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=48,
        n_positions=140,
        **_SPECIAL,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES, **_SPECIAL),
    "opt": lambda: hf.OPTConfig(
        **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
        **_SPECIAL,
    ),
    "phi": lambda: hf.PhiConfig(**_LLAMA),
    "phi3": lambda: hf.Phi3Config(**_LLAMA),
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, head_dim=8),
    "smollm3": lambda: hf.SmolLM3Config(**_LLAMA),
    "gemma": lambda: hf.GemmaConfig(**_LLAMA, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=5),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**_GEMMA3),
    "gemma3": _gemma3,
    "mixtral": lambda: hf.MixtralConfig(**_EXPERTS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_EXPERTS,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        num_labels=3,
    ),
    "bart": lambda: hf.BartConfig(**_BART, max_position_embeddings=140, num_labels=3),
    "whisper": lambda: hf.WhisperConfig(
        **_BART, num_mel_bins=8, max_source_positions=FRAMES, max_target_positions=40
    ),
    "vit": lambda: hf.ViTConfig(**_PARTS, **_IMAGE),
    "clip": lambda: hf.CLIPConfig(
        text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=16
    ),
    "clip_text_model": lambda: hf.CLIPTextConfig(**_CLIP_TEXT),
    "clip_vision_model": lambda: hf.CLIPVisionConfig(**_CLIP_VISION),
    "wav2vec2": lambda: hf.Wav2Vec2Config(
        **_PARTS,
        vocab_size=VOCABULARY,
        conv_dim=(16, 16),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=16,
        mask_time_prob=0.0,
        layerdrop=0.0,
    ),
}
"""A small configuration of every family."""

ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    *("distilbert", "albert", "mpnet", "deberta-v2", "modernbert"),
)
DECODERS = (
    *("gpt2", "gpt_neox", "opt", "phi", "phi3", "llama", "mistral", "qwen2", "qwen3", "smollm3"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "mixtral", "qwen3_moe"),
)
SEQ2SEQ = ("t5", "bart", "whisper")
EXPERTS = ("mixtral", "qwen3_moe")
EAGER_ONLY = ("mpnet", "deberta-v2", "gemma2")
"""Families that have one implementation of attention only."""
CORE = ("bert", "roberta", "electra", "distilbert", "gpt2", "llama")
"""Families that every test over families takes: one of each kind that decisions depend on."""


def auto_class(name: str) -> Any:
    """The auto class of the task that a family is tested with."""
    if name in DECODERS:
        return hf.AutoModelForCausalLM
    special = {
        "t5": hf.AutoModelForSeq2SeqLM,
        "bart": hf.AutoModelForSeq2SeqLM,
        "whisper": hf.AutoModelForSpeechSeq2Seq,
        "vit": hf.AutoModelForImageClassification,
        "wav2vec2": hf.AutoModelForAudioClassification,
    }
    return special.get(
        name, hf.AutoModelForSequenceClassification if name in ENCODERS else hf.AutoModel
    )


def _text(name: str, generator: torch.Generator, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    config = TINY[name]()
    rows, tokens = len(lengths), max(lengths)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()  # [B, T]
    padding = config.get_text_config().pad_token_id
    ids = torch.where(mask.bool(), ids, 0 if padding is None else padding)
    if name.startswith("clip"):
        ids[:, -1] = 2  # the end of the text, which is pooled
    return {"input_ids": ids, "attention_mask": mask}


def _other(name: str, generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    """What families take that do not read text: images, sound, or text beside images."""
    if name == "wav2vec2":
        return {"input_values": torch.randn(rows, 160, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 2 * FRAMES, generator=generator)}
    return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}


def inputs_for(name: str, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """A right-padded batch, with labels where the tested task has some."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    batch: dict[str, Tensor] = {}
    if name not in ("whisper", "wav2vec2", "vit", "clip_vision_model"):
        batch = _text(name, generator, lengths)
    if name in ("whisper", "wav2vec2", "vit", "clip_vision_model", "clip"):
        batch |= _other(name, generator, rows)
    if name in DECODERS:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif name in SEQ2SEQ:
        batch["labels"] = torch.randint(5, VOCABULARY, (rows, 7), generator=generator)
    elif not name.startswith("clip"):
        batch["labels"] = torch.randint(0, 3, (rows,), generator=generator)
    return batch


def without_labels(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What to call a model with for its prediction; the labels of a decoder become its input."""
    takes = inspect.signature(model.forward).parameters
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in batch.items()
        if key in takes and key != "labels"
    }
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = labels
    elif not inputs:  # the decoder of a speech model alone
        inputs["input_ids"] = batch["labels"]
    return inputs


def prediction(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What a model says about real tokens (or about the examples): logits, or hidden states."""
    with torch.no_grad():
        output = model(**without_labels(model, batch))
    keys = ("logits", "logits_per_image", "start_logits", "last_hidden_state")
    found: Tensor = next(output[key] for key in keys if key in output)
    mask = batch.get("attention_mask")
    if found.ndim == 3 and mask is not None and found.shape[:2] == mask.shape:
        return found[mask.bool()]
    return found
