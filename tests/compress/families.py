"""One tiny model of each family that procedures know, with batches it can be run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CAUSAL", "FAMILIES", "batches", "build", "output"]

VOCAB = 61
FAMILIES = (
    "llama", "mistral", "qwen", "gemma2", "gpt2", "opt", "bert", "vit", "whisper", "timm", "ours",
)  # fmt: skip
CAUSAL = ("llama", "mistral", "qwen", "gpt2", "opt")
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(family: str, *, layers: int = 4, seed: int = 0) -> nn.Module:
    """Build the family's tiny model, in eval mode."""
    torch.manual_seed(seed)
    model = _BUILDERS[family](layers)
    return model.eval()


def _decoder(config: str, model: str, **more: Any) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        import transformers

        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        built: nn.Module = getattr(transformers, model)(
            getattr(transformers, config)(**(sizes | _IDS | more))
        )
        return built

    return make


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCAB, n_positions=128, **_IDS)
    )


def _opt(layers: int) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, ffn_dim=56,
            vocab_size=VOCAB, word_embed_proj_dim=32, max_position_embeddings=128, **_IDS,
        )
    )  # fmt: skip


def _bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=56,
            vocab_size=VOCAB, max_position_embeddings=64,
        )
    )  # fmt: skip


def _vit(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=56,
            image_size=16, patch_size=4, num_labels=5,
        )
    )  # fmt: skip


def _whisper(layers: int) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=32, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=56, decoder_ffn_dim=56, vocab_size=VOCAB,
            num_mel_bins=8, max_source_positions=20, max_target_positions=32,
            decoder_start_token_id=1, begin_suppress_tokens=None, **_IDS,
        )
    )  # fmt: skip


def _timm(layers: int) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=layers)


def _ours(layers: int) -> nn.Module:
    from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig

    return MixerLM(
        MixerLMConfig(
            vocab_size=VOCAB, embed_dim=32, num_heads=2, mixers="gla,softmax", num_layers=layers
        )
    )


def _encoder(layers: int) -> nn.Module:
    from manyheads.models.language.mixer_encoder import MixerEncoder, MixerEncoderConfig

    return MixerEncoder(
        MixerEncoderConfig(
            vocab_size=VOCAB, num_classes=5, embed_dim=32, num_heads=2, mixers="softmax,gla",
            num_layers=layers,
        )
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "llama": _decoder("LlamaConfig", "LlamaForCausalLM"),
    "mistral": _decoder("MistralConfig", "MistralForCausalLM", sliding_window=None),
    "qwen": _decoder("Qwen2Config", "Qwen2ForCausalLM"),
    "gemma2": _decoder("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, sliding_window=16),
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "vit": _vit,
    "whisper": _whisper,
    "timm": _timm,
    "ours": _ours,
    "encoder": _encoder,
}


def batches(family: str, *, count: int = 2, length: int = 13) -> list[dict[str, Tensor]]:
    """Return batches for ``model(**batch)``, ragged where the family knows masks."""
    generator = torch.Generator().manual_seed(7)

    def one() -> dict[str, Tensor]:
        ids = torch.randint(3, VOCAB, (3, length), generator=generator)
        if family == "vit":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        if family == "timm":
            return {"x": torch.randn(2, 3, 32, 32, generator=generator)}
        if family == "ours":
            return {"tokens": ids}
        if family == "whisper":
            mels = torch.randn(3, 8, 40, generator=generator)
            return {"input_features": mels, "decoder_input_ids": ids}
        mask = torch.ones_like(ids)
        mask[1, -4:] = 0
        if family == "encoder":
            return {"x": ids, "mask": mask.bool()}
        return {"input_ids": ids, "attention_mask": mask}

    return [one() for _ in range(count)]


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits or last hidden state of a batch."""
    with torch.no_grad():
        found: Any = model(**batch)
    if isinstance(found, Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
