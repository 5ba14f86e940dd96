"""μ²LLM as a transformers model: vision tower, projector, visual tokenizer and any decoder as the language model.

Shape letters: B batch, C chunks, D H W a chunk's slices, rows, columns, N pooled tokens of a chunk, Q visual tokens in the
prompt, T question tokens, S prompt tokens. Weights may be created on the meta device, so initial values come from
`_init_weights` alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from mu2_model.attention import MultiHeadAttention, ScaledLinear
from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.vision_tower import Mu2Projector, Mu2VisionTower
from mu2_model.visual_tokenizer import (
    INITIAL_MEAN_SHARE,
    Aggregator,
    Mu2VisualTokenizer,
    TokenizerMaps,
    TokenSelection,
    TokenStandardization,
    selection_entropy,
)

QUERY_STD = 0.02


@dataclass
class Mu2ImageFeatures(BaseModelOutputWithPooling):
    """Encoded volumes: `pooler_output` (B, Q, H) for the prompt, `last_hidden_state` (B, V, H) before the queries.

    `selection_entropy` (scalar, 1 = uniform) and `gate_weights` (B, scales) are what training watches; `maps` holds the
    weights that evidence is made of, when asked for.
    """

    selection_entropy: Tensor | None = None
    gate_weights: Tensor | None = None
    maps: TokenizerMaps | None = None


@dataclass
class Mu2ModelOutput(BaseModelOutputWithPast):
    """Output of the inner model, with the visual tokens (B, Q, H) it used."""

    image_hidden_states: Tensor | None = None
    selection_entropy: Tensor | None = None
    gate_weights: Tensor | None = None


@dataclass
class Mu2CausalLMOutput(CausalLMOutputWithPast):
    """Output with loss and logits, with the visual tokens (B, Q, H) it used."""

    image_hidden_states: Tensor | None = None
    selection_entropy: Tensor | None = None
    gate_weights: Tensor | None = None


class Mu2PreTrainedModel(PreTrainedModel):
    """What both classes share: the config, the initial values and what the language model supports."""

    config: Mu2Config
    config_class = Mu2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionBlock", "RefinerLayer", "AggregatorLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that own a parameter, so every value is set by its owner.
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, std=module.initial_std)
        elif isinstance(module, Mu2VisionTower):
            init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
            init.zeros_(module.cls_token)
        elif isinstance(module, TokenStandardization):
            init.constant_(module.mean_share, INITIAL_MEAN_SHARE)
        elif isinstance(module, MultiHeadAttention) and module.positions == "relative":
            init.zeros_(module.relative_bias)
        elif isinstance(module, TokenSelection) and hasattr(module, "log_temperature"):
            init.constant_(module.log_temperature, math.log(module.initial_temperature))
        elif isinstance(module, Aggregator):
            init.normal_(module.query_tokens, std=QUERY_STD)


class Mu2Model(Mu2PreTrainedModel):
    """μ²LLM without a language-model head; takes every multimodal keyword and returns `last_hidden_state`."""

    def __init__(self, config: Mu2Config):
        super().__init__(config)
        self.vision_tower = Mu2VisionTower(config.vision)
        self.projector = Mu2Projector(config)
        self.visual_tokenizer = Mu2VisualTokenizer(config.tokenizer, config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def encode_chunks(self, pixel_values: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """Vision tower and projector: (B, C, channels, D, H, W) to (B, C, N, H); empty chunks cost nothing and are 0."""
        batch, chunks = pixel_values.shape[:2]
        pixel_values = pixel_values.to(self.vision_tower.position_embedding.dtype)
        chunk_mask = self._usable_chunk_mask(chunk_mask)
        if chunk_mask is None:
            return self.projector(self.vision_tower(pixel_values.flatten(0, 1))).unflatten(0, (batch, chunks))
        live_LNH = self.projector(self.vision_tower(pixel_values[chunk_mask]))
        tokens = live_LNH.new_zeros(batch, chunks, *live_LNH.shape[1:])
        return tokens.masked_scatter(chunk_mask[:, :, None, None], live_LNH)

    def get_image_features(
        self,
        pixel_values: Tensor,
        question_ids: Tensor,
        question_attention_mask: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        output_maps: bool = False,
        **kwargs: Any,
    ) -> Mu2ImageFeatures:
        """Encode volumes under their questions; `pooler_output` (B, Q, H) are the visual tokens for the prompt.

        `pixel_values` (B, C, channels, D, H, W) float, `question_ids` and `question_attention_mask` (B, T),
        `chunk_mask` (B, C) bool, False for chunks that hold no slice. Raises ValueError for a volume without a chunk, a
        question without a token, or numbers of volumes and questions that differ.
        """
        check_rows(pixel_values, question_ids, question_attention_mask, chunk_mask)
        chunk_mask = self._usable_chunk_mask(chunk_mask)
        if chunk_mask is not None:
            # Chunks at the end that no volume of the batch has would still cost attention.
            last = int(chunk_mask.any(dim=0).nonzero().max()) + 1
            pixel_values, chunk_mask = pixel_values[:, :last], chunk_mask[:, :last]
        tokens_BCNH = self.encode_chunks(pixel_values, chunk_mask)
        return self.gather_tokens(tokens_BCNH, question_ids, question_attention_mask, chunk_mask, output_maps)

    def gather_tokens(
        self,
        tokens_BCNH: Tensor,
        question_ids: Tensor,
        question_attention_mask: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        output_maps: bool = False,
    ) -> Mu2ImageFeatures:
        """The part of `get_image_features` that depends on the question: encoded chunks to visual tokens.

        Several questions about one volume share one `encode_chunks`, the dear part.
        """
        check_rows(tokens_BCNH, question_ids, question_attention_mask, chunk_mask)
        chunk_mask = self._usable_chunk_mask(chunk_mask)
        question_mask = None if question_attention_mask is None else question_attention_mask.bool()
        if not self.config.tokenizer.mask_question_padding:
            question_mask = None
        if question_mask is not None and not bool(question_mask.any(dim=1).all()):
            raise ValueError("a question without a token: ask something, or leave the volume out")
        question_BTH = self.get_input_embeddings()(question_ids)
        tokens_BQH, visual_BVH, maps = self.visual_tokenizer(
            tokens_BCNH, question_BTH, question_mask, chunk_mask, output_maps
        )
        watched = self.training or output_maps
        return Mu2ImageFeatures(
            last_hidden_state=visual_BVH,
            pooler_output=tokens_BQH,
            selection_entropy=selection_entropy(maps.selection, chunk_mask) if watched else None,
            gate_weights=maps.gates.detach() if watched else None,
            maps=maps if output_maps else None,
        )

    def _usable_chunk_mask(self, chunk_mask: Tensor | None) -> Tensor | None:
        if chunk_mask is None or not self.config.tokenizer.mask_empty_chunks:
            return None
        chunk_mask = chunk_mask.bool()
        if not bool(chunk_mask.any(dim=1).all()):
            raise ValueError("a volume without a live chunk: chunk_mask is False everywhere in one row")
        return None if bool(chunk_mask.all()) else chunk_mask

    def place_image_tokens(self, input_ids: Tensor, inputs_embeds: Tensor, tokens_BQH: Tensor) -> Tensor:
        """Put the visual tokens into the prompt's embeddings (B, S, H); raises ValueError when the counts differ."""
        if len(tokens_BQH) != len(input_ids):
            raise ValueError(f"{len(tokens_BQH)} encoded volumes, but {len(input_ids)} prompts: one each is needed")
        queries = tokens_BQH.shape[1]
        tokens_BQH = tokens_BQH.to(inputs_embeds.dtype)
        if self.config.image_placement == "second_position":
            if inputs_embeds.shape[1] <= queries:
                raise ValueError(f"a prompt of {inputs_embeds.shape[1]} tokens has no room for {queries} visual tokens")
            return torch.cat((inputs_embeds[:, :1], tokens_BQH, inputs_embeds[:, queries + 1 :]), dim=1)
        placeholder = input_ids == self.config.image_token_id
        counts = placeholder.sum(dim=1).tolist()
        if any(count != queries for count in counts):
            raise ValueError(
                f"prompts hold {counts} image placeholders (token {self.config.image_token_id}), "
                f"but every volume makes {queries} visual tokens"
            )
        return inputs_embeds.masked_scatter(placeholder[..., None], tokens_BQH)

    def _check_no_placeholder(self, input_ids: Tensor, past_key_values: Cache | None) -> None:
        """ValueError for a prompt that waits for visual tokens; a cache may hold those of an earlier call."""
        # One token is a step of decoding: asking about its values would break the compiled graph.
        if self.config.image_placement != "token_id" or input_ids.shape[1] == 1:
            return
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return
        if bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                f"prompts hold image placeholders (token {self.config.image_token_id}), but no volume was given: pass "
                "pixel_values with question_ids, or encoded images"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Mu2ModelOutput:
        """Run the language model over the prompt (B, S) with the volumes' tokens in it.

        Volumes come as `pixel_values` with `question_ids`, or already encoded as
        `mm_encoder_outputs={"image": get_image_features(...)}`, so that many samples share one encoding. Raises
        ValueError when volumes, questions and prompts are not as many, or placeholders wait for a volume that is not given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if features is not None:
                raise ValueError("give pixel_values or encoded images, not both")
            if question_ids is None:
                raise ValueError("pixel_values need question_ids: the visual tokens depend on the question")
            features = self.get_image_features(pixel_values, question_ids, question_attention_mask, chunk_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is not None:
            if input_ids is None:
                raise ValueError("visual tokens are placed by input_ids; inputs_embeds must hold them already")
            inputs_embeds = self.place_image_tokens(input_ids, inputs_embeds, features.pooler_output)
        elif input_ids is not None:
            self._check_no_placeholder(input_ids, past_key_values)
        kwargs.pop("return_dict", None)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return Mu2ModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
            selection_entropy=None if features is None else features.selection_entropy,
            gate_weights=None if features is None else features.gate_weights,
        )


def check_rows(
    volumes: Tensor, question_ids: Tensor, question_attention_mask: Tensor | None, chunk_mask: Tensor | None
) -> None:
    """ValueError unless every tensor has one row for every volume; torch would repeat a single row without a word."""
    rows = {
        "question_ids": question_ids,
        "question_attention_mask": question_attention_mask,
        "chunk_mask": chunk_mask,
    }
    for name, tensor in rows.items():
        if tensor is not None and len(tensor) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes, but {len(tensor)} rows of {name}: one each is needed")


class Mu2ForConditionalGeneration(Mu2PreTrainedModel, GenerationMixin):
    """μ²LLM with its language-model head: volumes and a question in, a report out."""

    def __init__(self, config: Mu2Config):
        super().__init__(config)
        self.model = Mu2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        # Decoders name their embeddings differently, so the tie is found, not written down.
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: Tensor,
        question_ids: Tensor,
        question_attention_mask: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        output_maps: bool = False,
        **kwargs: Any,
    ) -> Mu2ImageFeatures:
        """`Mu2Model.get_image_features`."""
        return self.model.get_image_features(
            pixel_values, question_ids, question_attention_mask, chunk_mask, output_maps, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_attention_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Mu2CausalLMOutput:
        """`Mu2Model.forward`, then logits (B, S, vocabulary) and, with `labels` (B, S; -100 is ignored), the loss."""
        loss_arguments = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            chunk_mask=chunk_mask,
            question_ids=question_ids,
            question_attention_mask=question_attention_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.lm_head.out_features, **loss_arguments
            )
        return Mu2CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            selection_entropy=outputs.selection_entropy,
            gate_weights=outputs.gate_weights,
        )


__all__ = ["Mu2ForConditionalGeneration", "Mu2ImageFeatures", "Mu2Model", "Mu2PreTrainedModel"]
