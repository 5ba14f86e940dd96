"""Small configs that every model test shares: chunks of 8 x 32 x 32 voxels, 32 tokens a chunk."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration

QUERIES, VOCABULARY, IMAGE_TOKEN = 16, 120, 119
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": (8, 32, 32),
    "patch_size": (2, 4, 4),
}
TOKENIZER = {"num_query_tokens": QUERIES, "num_selected_tokens": 32, "num_layers": 2, "num_attention_heads": 4}


def llama(width: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def small_config(text: PreTrainedConfig | None = None, **tokenizer: Any) -> Mu2Config:
    return Mu2Config(
        vision_config=VISION,
        tokenizer_config={**TOKENIZER, **tokenizer},
        text_config=text or llama(),
        image_token_id=IMAGE_TOKEN,
    )


def small_legacy(text: PreTrainedConfig | None = None, **tokenizer: Any) -> Mu2Config:
    return Mu2Config.legacy(
        text or llama(),
        vision_config={**VISION, "num_channels": 3},
        tokenizer_config={**TOKENIZER, **tokenizer},
        image_token_id=IMAGE_TOKEN,
    )


def build(config: Mu2Config, seed: int = 0) -> Mu2ForConditionalGeneration:
    torch.manual_seed(seed)
    return Mu2ForConditionalGeneration(config).eval()


def inputs(batch: int = 2, chunks: int = 3, seed: int = 1, answer: int = 0) -> dict[str, Tensor]:
    """Model inputs with a question of 6 tokens; `answer` tokens after it for training."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.randint(3, IMAGE_TOKEN, (batch, 6), generator=generator)
    reply = torch.randint(3, IMAGE_TOKEN, (batch, answer), generator=generator)
    ids = torch.cat((torch.full((batch, 1), 4), torch.full((batch, QUERIES), IMAGE_TOKEN), question, reply), dim=1)
    return {
        "pixel_values": torch.rand(batch, chunks, 3, 8, 32, 32, generator=generator),
        "question_ids": question,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
