"""A tiny μ²LLM with random weights and its own small vocabulary, for demonstrations and tests.

Its text means nothing. The config says `trained_on: "nothing"`, so that whoever shows a draft can say so.
"""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.processing_mu2 import IMAGE_TOKEN, Mu2Processor

PAD, UNKNOWN, END, USER, ASSISTANT = "<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>"
    "{% else %}<|assistant|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_IMAGE_TOKENS = 16
MAX_NEW_TOKENS = 48

WORDS = """
Findings Impression Recommendations Describe Write Report What the this a an is are was in of on at to with without for and or
no not there normal clear enlarged small large mild moderate severe left right upper middle lower lobe segment bilateral
chest abdomen pelvis CT scan image report findings impression study lung lungs pleura pleural effusion pneumothorax nodule
mass consolidation atelectasis emphysema airways trachea heart cardiomegaly pericardial aorta aneurysm coronary
calcification mediastinum lymph nodes lymphadenopathy liver hepatic cyst lesion steatosis gallbladder gallstones bile ducts
spleen splenomegaly pancreas kidney kidneys renal calculus hydronephrosis adrenal glands bladder stone bowel stomach
ascites free fluid air vertebral fracture spine ribs bones lytic soft tissue seen noted size measures mm cm unchanged
acute chronic suspicious benign follow up recommended evidence otherwise unremarkable contrast visible please describe you
can provide caption consists expressions medical
"""
PUNCTUATION = (".", ",", ":", ";", "(", ")", "/", "-", "?")


def build_tokenizer(text: str = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `text`, digits and punctuation, with the special tokens of the prompt."""
    words = list(dict.fromkeys(re.findall(r"[A-Za-z]+", text)))
    vocabulary = [PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE_TOKEN, *PUNCTUATION, *map(str, range(10)), *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return with_prompt(tokenizer)


def with_prompt(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary has the prompt's special tokens, with their roles and the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, IMAGE_TOKEN],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(vocabulary: int, image_token_id: int) -> Mu2Config:
    """A corrected μ²LLM of about 0.4 million parameters over chunks of 16 x 64 x 64 voxels."""
    return Mu2Config(
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": [16, 64, 64],
            "patch_size": [4, 16, 16],
        },
        tokenizer_config={
            "num_layers": 1,
            "num_query_tokens": NUM_IMAGE_TOKENS,
            "num_selected_tokens": 16,
            "max_relative_positions": 32,
        },
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=image_token_id,
        model_name="mu2-untrained",
    )


def make_untrained(folder: Path | str, seed: int = 0) -> Path:
    """Write a complete checkpoint folder (weights, tokenizer, processor); the same seed gives the same weights."""
    folder = Path(folder)
    tokenizer = build_tokenizer()
    processor = Mu2Processor(
        Mu2ImageProcessor(size=64, chunk_slices=16, max_slices=64, slice_mm=6.0),
        tokenizer,
        num_image_tokens=NUM_IMAGE_TOKENS,
        max_prompt_tokens=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mu2ForConditionalGeneration(tiny_config(len(tokenizer), processor.image_token_id))
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Random weights repeat themselves without end, and choose tokens that no text holds.
        no_repeat_ngram_size=2,
        suppress_tokens=[token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
