"""Named models to train from nothing, and the defaults of every stage, in one place to read.

The numbers of the stages are those of the method's publication where it gives one; a config file overrides them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from mu2_model import Mu2Config, Mu2ForConditionalGeneration, Mu2ImageProcessor, Mu2Processor
from mu2_model.configuration_mu2 import ABLATIONS
from mu2_model.image_processing_mu2 import DEFAULT_WINDOWS
from mu2_model.processing_mu2 import IMAGE_TOKEN
from mu2_model.untrained import ASSISTANT, END, PAD, UNKNOWN, USER, with_prompt
from training.data import Case


@dataclass(frozen=True)
class ModelRecipe:
    """The sizes of a small μ²LLM that is trained from nothing; lengths in voxels, (slices, rows, columns)."""

    name: str
    size: int
    chunk_slices: int
    max_slices: int
    slice_mm: float
    patch: tuple[int, int, int]
    stem: tuple[int, ...]
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    tokenizer_layers: int
    tokenizer_heads: int
    queries: int
    selected: int
    text_layers: int
    text_heads: int
    max_prompt_tokens: int
    max_new_tokens: int
    windows: tuple[tuple[float, float], ...] = DEFAULT_WINDOWS
    """Channels: (level, width) in HU."""


RECIPES = {
    # What two CPU cores train in an evening on PhantomCT-core: its grid of 4 mm is kept.
    "phantom": ModelRecipe(
        name="mu2-phantom",
        size=96,
        chunk_slices=16,
        max_slices=128,
        slice_mm=4.0,
        patch=(4, 8, 8),
        stem=(32, 64, 96),
        vision_width=96,
        vision_layers=2,
        vision_heads=4,
        width=160,
        tokenizer_layers=2,
        tokenizer_heads=4,
        queries=32,
        selected=64,
        text_layers=4,
        text_heads=4,
        max_prompt_tokens=128,
        max_new_tokens=224,
        # A lung window half as wide as a reader's: the air of a pneumothorax is 150 HU below lung, a fifth of it and not a tenth.
        windows=((-700.0, 700.0), (40.0, 400.0), (400.0, 1800.0)),
    ),
    # A few seconds a stage: shows that every stage runs, learns nothing worth reading.
    "smoke": ModelRecipe(
        name="mu2-smoke",
        size=48,
        chunk_slices=16,
        max_slices=64,
        slice_mm=8.0,
        patch=(4, 8, 8),
        stem=(8, 16, 32),
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        width=48,
        tokenizer_layers=1,
        tokenizer_heads=2,
        queries=8,
        selected=16,
        text_layers=2,
        text_heads=2,
        max_prompt_tokens=96,
        max_new_tokens=160,
    ),
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a corpus, with digits and punctuation apart and the special tokens of the prompt.

    Phantom reports use a few hundred words, so whole words keep sequences short; the vocabulary comes from training text only.
    """
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Fuse()])
    special = [PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE_TOKEN]
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=special, show_progress=False))
    # Every digit and the usual marks must be writable even where the corpus was small.
    assert isinstance(tokenizer.model, models.WordLevel)
    missing = [mark for mark in "0123456789.,:;()-/" if tokenizer.token_to_id(mark) is None]
    tokenizer.add_tokens(missing)
    return with_prompt(tokenizer)


def model_config(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast, ablation: str = "full") -> Mu2Config:
    """The μ²LLM config of a recipe under one of the five named ablations."""
    relative, soft, gated = ABLATIONS[ablation]
    grid = [recipe.chunk_slices // recipe.patch[0], recipe.size // recipe.patch[1], recipe.size // recipe.patch[2]]
    image_token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pooled = grid[0] * grid[1] * grid[2] // 8
    return Mu2Config(
        vision_config={
            "hidden_size": recipe.vision_width,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": recipe.vision_heads,
            "intermediate_size": 4 * recipe.vision_width,
            "image_size": [recipe.chunk_slices, recipe.size, recipe.size],
            "patch_size": list(recipe.patch),
            "stem_channels": list(recipe.stem),
        },
        tokenizer_config={
            "num_layers": recipe.tokenizer_layers,
            "num_attention_heads": recipe.tokenizer_heads,
            "num_query_tokens": recipe.queries,
            "num_selected_tokens": recipe.selected,
            "max_relative_positions": max(pooled, recipe.queries),
            "positions": "relative" if relative else "none",
            "selection": "soft" if soft else "hard",
            "gated_pooling": gated,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=4 * recipe.width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_heads,
            num_key_value_heads=recipe.text_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=image_token_id,
        model_name=recipe.name,
    )


def make_initial(recipe: ModelRecipe, cases: list[Case], folder: Path, seed: int = 0, ablation: str = "full") -> Path:
    """Write an untrained checkpoint folder with the recipe's sizes and a vocabulary made from the training cases."""
    texts = [text for case in cases if case.split == "train" for text in (case.question, case.answer)]
    tokenizer = train_tokenizer(texts)
    image = Mu2ImageProcessor(
        size=recipe.size,
        chunk_slices=recipe.chunk_slices,
        max_slices=recipe.max_slices,
        slice_mm=recipe.slice_mm,
        windows=recipe.windows,
    )
    processor = Mu2Processor(
        image, tokenizer, num_image_tokens=recipe.queries, max_prompt_tokens=recipe.max_prompt_tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mu2ForConditionalGeneration(model_config(recipe, tokenizer, ablation))
    model.generation_config = GenerationConfig(
        max_new_tokens=recipe.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class StageDefaults:
    """What a stage does when nothing else is asked: learning rate, epochs, schedule, share of warm-up, batch a device."""

    learning_rate: float
    epochs: float
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    batch_size: int = 8
    weight_decay: float = 0.0
    beta: float = 0.1
    """Strength of the pull to the reference model; of dpo alone."""


STAGES = {
    "vision": StageDefaults(learning_rate=3e-4, epochs=10, batch_size=16, weight_decay=0.05),
    "sft-align": StageDefaults(learning_rate=1e-4, epochs=1),
    "sft": StageDefaults(learning_rate=1e-5, epochs=4),
    "dpo": StageDefaults(learning_rate=1e-6, epochs=1, batch_size=4),
}


def describe(stage: str) -> dict[str, Any]:
    """A stage's defaults as plain values, for a config file to start from.

    >>> describe("dpo")["beta"]
    0.1
    """
    return asdict(STAGES[stage])


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
