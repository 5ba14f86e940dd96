"""Volumes and questions to everything the model takes: pixels, the prompt with image placeholders, the question apart.

The visual tokens depend on the question, so it is tokenized twice: inside the prompt and alone (`question_ids`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mu2_model.errors import QuestionError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor, Volume

IMAGE_TOKEN = "<im_patch>"
# The question whose answers the published scores were counted on.
PUBLISHED_QUESTION = "Can you provide a caption consists of findings and expressions for this medical image?"


class Mu2Processor(ProcessorMixin):
    """Image processor and tokenizer in one, with the prompt layout.

    `num_image_tokens` is Q of the model. `prompt_form`: "chat" puts placeholders and question into the tokenizer's chat
    template; "published" is placeholders followed by the bare question. `question_padding` pads `question_ids` to a fixed
    length as some published models were trained with (768 or 1024; None pads to the longest of the batch).
    `max_prompt_tokens` bounds the prompt; a longer question is refused, never cut.
    """

    image_processor: Mu2ImageProcessor
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        image_processor: Mu2ImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        num_image_tokens: int = 256,
        image_token: str = IMAGE_TOKEN,
        prompt_form: str = "chat",
        question_padding: int | None = None,
        max_prompt_tokens: int = 2048,
    ):
        if prompt_form not in ("chat", "published"):
            raise ValueError(f"prompt_form is 'chat' or 'published', not {prompt_form!r}")
        self.num_image_tokens, self.image_token, self.prompt_form = num_image_tokens, image_token, prompt_form
        self.question_padding, self.max_prompt_tokens = question_padding, max_prompt_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        image_token_id: Any = self.tokenizer.convert_tokens_to_ids(image_token)
        self.image_token_id: int = image_token_id
        if image_token_id is None or self.image_token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token")

    def build_prompt(self, question: str) -> str:
        """The prompt up to where the report begins; QuestionError for an empty question or one with a placeholder."""
        if not isinstance(question, str):
            raise QuestionError(f"a question is a text, not a {type(question).__name__}")
        question = question.strip()
        if not question:
            raise QuestionError("the question is empty")
        if self.image_token in question:
            raise QuestionError(f"the question holds the image placeholder {self.image_token}")
        placeholders = self.image_token * self.num_image_tokens
        if self.prompt_form == "published":
            return placeholders + question
        message = [{"role": "user", "content": f"{placeholders}\n{question}"}]
        # A thinking block is never part of a report; templates that know no such switch ignore it.
        prompt = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(prompt)

    def __call__(  # type: ignore[override]
        self,
        images: Volume | Sequence[Volume] | None = None,
        text: str | Sequence[str] | None = None,
        questions: str | Sequence[str] | None = None,
        padding_side: str = "left",
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """Batch of volumes and questions, one each, to model inputs.

        `images`: (array, affine) in Hounsfield units, or a list; `questions`: one per volume; `text`: full prompts with
        their placeholders, made by `build_prompt` when left out. Returns tensors `pixel_values`, `chunk_mask`,
        `input_ids`, `attention_mask`, `question_ids`, `question_attention_mask`.
        """
        asked = [questions] if isinstance(questions, str) else list(questions or [])
        prompts = [text] if isinstance(text, str) else list(text or [self.build_prompt(question) for question in asked])
        if not asked:
            raise QuestionError("pass questions=: the visual tokens depend on the question, not on the whole prompt")
        if len(asked) != len(prompts):
            raise QuestionError(f"{len(asked)} questions, but {len(prompts)} prompts")
        data: dict[str, Any] = {}
        if images is not None:
            data.update(self.image_processor(images, device=device))
            if data["pixel_values"].shape[0] != len(asked):
                raise QuestionError(f"{data['pixel_values'].shape[0]} volumes, but {len(asked)} questions")
        data.update(self.encode_text(prompts, asked, padding_side))
        return BatchFeature({key: value.to(device) for key, value in data.items()})

    def encode_text(
        self, prompts: list[str], questions: list[str], padding_side: str = "left"
    ) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `question_ids`, `question_attention_mask`; QuestionError when a prompt is too long."""
        # A chat template writes its own first token; the bare published prompt leaves that to the tokenizer.
        prompt_ids = self.tokenizer(prompts, add_special_tokens=self.prompt_form == "published")["input_ids"]
        longest = max(len(ids) for ids in prompt_ids)
        if longest > self.max_prompt_tokens:
            raise QuestionError(
                f"a prompt of {longest} tokens; at most {self.max_prompt_tokens} fit, ask a shorter question"
            )
        question_ids = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        if any(not ids for ids in question_ids):
            raise QuestionError("a question without a token")
        input_ids, attention_mask = self._pad(prompt_ids, longest, padding_side)
        width = self.question_padding or max(len(ids) for ids in question_ids)
        if any(len(ids) > width for ids in question_ids):
            raise QuestionError(f"a question of more than {width} tokens")
        ids, mask = self._pad(question_ids, width, "right")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "question_ids": ids,
            "question_attention_mask": mask,
        }

    def _pad(self, rows: list[list[int]], width: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(rows), width), int(filler))
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return ids, mask

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` returns."""
        return [
            "pixel_values",
            "chunk_mask",
            "input_ids",
            "attention_mask",
            "question_ids",
            "question_attention_mask",
        ]
