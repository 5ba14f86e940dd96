"""Configuration of μ²LLM: a vision tower, a visual tokenizer and a language model, each in its own section.

The default is the corrected design; `Mu2Config.legacy` is the published one, with every quirk a field, so that released
weights keep their meaning. Sources: "μ²Tokenizer" (arXiv 2507.00316) and the configs of its released checkpoints.
"""

from typing import Any, ClassVar, Literal, cast, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

TrainedOn = Literal["nothing", "phantoms", "patients"]
TRAINED_ON: tuple[TrainedOn, ...] = get_args(TrainedOn)

# What each published ablation switches on: (relative positions, soft selection, gated pooling).
ABLATIONS: dict[str, tuple[bool, bool, bool]] = {
    "baseline": (False, False, False),
    "+RPE": (True, False, False),
    "+DTS": (False, True, False),
    "+DMTP": (False, False, True),
    "full": (True, True, True),
}


class Mu2VisionConfig(PreTrainedConfig):
    """The 3D vision transformer that encodes one chunk of slices; the default is ViT-B/3D of M3D-CLIP with three windows.

    `image_size` and `patch_size` are (slices, rows, columns) of a chunk. `stem_channels` empty cuts patches and embeds
    them by one matrix, as published; else 3×3×3 convolutions of these widths, each halving the axes, come down to the patches.
    """

    model_type = "mu2_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_channels: int = 3
    image_size: list[int] | tuple[int, ...] = (32, 256, 256)
    patch_size: list[int] | tuple[int, ...] = (4, 16, 16)
    stem_channels: list[int] | tuple[int, ...] = ()
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.image_size, self.patch_size = list(self.image_size), list(self.patch_size)
        if len(self.image_size) != 3 or len(self.patch_size) != 3:
            raise ValueError("image_size and patch_size are (slices, rows, columns)")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if size % patch:
                raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        self.stem_channels = list(self.stem_channels)
        reachable = [2**halvings for halvings in range(len(self.stem_channels) + 1)]
        if self.stem_channels and not all(patch in reachable for patch in self.patch_size):
            raise ValueError(f"{len(self.stem_channels)} halvings reach patches of {reachable}, not {self.patch_size}")
        if self.stem_channels and self.stem_channels[-1] != self.hidden_size:
            raise ValueError(f"the last of stem_channels {self.stem_channels} is not hidden_size {self.hidden_size}")

    def level_patch(self, level: int) -> tuple[int, int, int]:
        """Voxels (slices, rows, columns) that a cell of a level of the stem stands for; level -1 is the patch itself."""
        halvings = range(len(self.stem_channels))[level] + 1
        depth, rows, columns = (min(patch, 2**halvings) for patch in self.patch_size)
        return depth, rows, columns

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """Patches of a chunk along (slices, rows, columns)."""
        grid = [size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True)]
        return grid[0], grid[1], grid[2]


class Mu2TokenizerConfig(PreTrainedConfig):
    """The visual tokenizer between vision tower and language model, its ablation switches and the published quirks.

    The three switches of the ablation are `positions` (RPE), `selection` (DTS) and `gated_pooling` (DMTP). The fields
    below `# corrections` are the differences between the corrected and the published design, one each.
    """

    model_type = "mu2_tokenizer"
    base_config_key = "tokenizer_config"

    num_attention_heads: int = 8
    num_layers: int = 4
    num_query_tokens: int = 256
    num_selected_tokens: int = 1024
    max_relative_positions: int = 512
    positions: Literal["relative", "rotary", "none"] = "relative"
    selection: Literal["soft", "hard"] = "soft"
    pooling_scales: list[int] | tuple[int, ...] = (1, 2, 4)
    gated_pooling: bool = True
    projector_pooling_size: int = 2
    # The grid that the projector pools; None is the true patch grid. Some published configs store another one.
    projector_grid: list[int] | tuple[int, ...] | None = None
    layer_norm_eps: float = 1e-5

    # corrections
    refiner_residual: bool = True  # pre-norm and residual around every attention of the refiner
    standardize_tokens: bool = True  # the mean of a volume's tokens is taken off, a small learned share stays
    normalize_aggregator_inputs: bool = True  # LayerNorm of keys and of question embeddings
    # Residual branches start small: near-uniform attention adds the same average to every token.
    residual_gain: float = 0.1
    # Over τ = 0.1 scores of this deviation average a few dozen of 2,048 tokens at the start.
    score_gain: float = 0.2
    aggregation_gain: float = 2.0  # a query gathers few tokens at the start, so that queries differ
    selection_temperature: float = 0.1
    learnable_temperature: bool = True
    gate_per_scale: bool = True  # one gate output per scale; a shared one is inert (see DynamicTokenPooling)
    mask_question_padding: bool = True
    mask_empty_chunks: bool = True

    # published quirks
    attention_over_first_axis: bool = False  # plain self-attention mixes samples and chunks instead of tokens
    unused_projections: bool = False  # the last aggregation carries a value and an output projection nobody uses

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.pooling_scales = list(self.pooling_scales)
        if self.projector_grid is not None:
            self.projector_grid = list(self.projector_grid)
        if self.attention_over_first_axis and self.positions != "none":
            raise ValueError("attention_over_first_axis belongs to plain attention: set positions='none'")
        for scale in self.pooling_scales:
            if self.num_selected_tokens % scale:
                raise ValueError(
                    f"num_selected_tokens {self.num_selected_tokens} is not a multiple of pooling scale {scale}"
                )


class Mu2Config(PreTrainedConfig):
    """Configuration of a whole μ²LLM; the language model is any decoder that `AutoModel` builds from its config.

    `image_token_id` is the id of the placeholder that the Q visual tokens replace. `preset` names the design the fields
    were made for; nothing reads it to change a computation.
    """

    model_type = "mu2"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=Mu2VisionConfig),
        "tokenizer_config": SubConfigSpec(config_class=Mu2TokenizerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    tokenizer_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 0
    # "token_id" puts visual tokens where the placeholder stands; "second_position" at 1..Q whatever stands there.
    image_placement: Literal["token_id", "second_position"] = "token_id"
    preset: Literal["corrected", "legacy"] = "corrected"
    model_name: str = "mu2"
    model_version: str = "0"
    # Whose drafts these may be: random weights and a model that saw phantoms alone say nothing about patients.
    trained_on: TrainedOn = "nothing"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The language model stores whether its head is tied; the composite model ties by its own field.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if self.trained_on not in TRAINED_ON:
            raise ValueError(f"trained_on is {self.trained_on!r}, not one of {', '.join(TRAINED_ON)}")
        vision, tokenizer = self.vision, self.tokenizer
        grid = tokenizer.projector_grid or list(vision.patch_grid)
        patches = vision.patch_grid[0] * vision.patch_grid[1] * vision.patch_grid[2]
        if grid[0] * grid[1] * grid[2] != patches:
            raise ValueError(f"projector_grid {grid} does not hold the {patches} patches of a chunk")
        if any(axis % tokenizer.projector_pooling_size for axis in grid):
            raise ValueError(
                f"projector grid {grid} is not a multiple of pooling size {tokenizer.projector_pooling_size}"
            )
        if self.hidden_size % tokenizer.num_attention_heads:
            raise ValueError(
                f"language-model width {self.hidden_size} is not a multiple of "
                f"{tokenizer.num_attention_heads} tokenizer heads"
            )
        longest = max(self.tokens_per_chunk, tokenizer.num_query_tokens)
        if tokenizer.positions == "relative" and longest > tokenizer.max_relative_positions:
            raise ValueError(
                f"{longest} tokens need max_relative_positions >= {longest}, not {tokenizer.max_relative_positions}"
            )

    @property
    def vision(self) -> Mu2VisionConfig:
        """`vision_config` as its class."""
        return cast(Mu2VisionConfig, self.vision_config)

    @property
    def tokenizer(self) -> Mu2TokenizerConfig:
        """`tokenizer_config` as its class."""
        return cast(Mu2TokenizerConfig, self.tokenizer_config)

    @property
    def hidden_size(self) -> int:
        """Width H of the language model, of the projector's output and of the tokenizer."""
        return int(cast(PreTrainedConfig, self.text_config).hidden_size)

    @property
    def vocab_size(self) -> int:
        """Tokens the language model knows."""
        return int(cast(PreTrainedConfig, self.text_config).vocab_size)

    @property
    def projector_grid(self) -> tuple[int, int, int]:
        """The grid of patches that the projector pools."""
        grid = self.tokenizer.projector_grid or self.vision.patch_grid
        return grid[0], grid[1], grid[2]

    @property
    def tokens_per_chunk(self) -> int:
        """Pooled tokens N of one chunk."""
        depth, height, width = (axis // self.tokenizer.projector_pooling_size for axis in self.projector_grid)
        return depth * height * width

    @classmethod
    def legacy(
        cls,
        text_config: PreTrainedConfig | dict[str, Any],
        *,
        attention: Literal["relative", "rotary", "first_axis"] = "relative",
        soft_selection: bool = True,
        gated_pooling: bool = True,
        multi_scale: bool = True,
        stored_image_size: tuple[int, int, int] | None = None,
        vision_config: dict[str, Any] | None = None,
        tokenizer_config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> "Mu2Config":
        """The published design, quirk by quirk.

        `stored_image_size` is the `image_size` of a published config.json where it differs from the true chunk: the
        projector then pools the patches as if they came from a chunk of that size.
        """
        vision = Mu2VisionConfig(**{"num_channels": 1, **(vision_config or {})})
        projector_grid = None
        if stored_image_size is not None and list(stored_image_size) != list(vision.image_size):
            projector_grid = [size // patch for size, patch in zip(stored_image_size, vision.patch_size, strict=True)]
        quirks: dict[str, Any] = {
            "positions": "none" if attention == "first_axis" else attention,
            "attention_over_first_axis": attention == "first_axis",
            "selection": "soft" if soft_selection else "hard",
            "gated_pooling": gated_pooling,
            "pooling_scales": [1, 2, 4] if multi_scale else [1],
            "projector_grid": projector_grid,
            "refiner_residual": False,
            "standardize_tokens": False,
            "normalize_aggregator_inputs": False,
            "residual_gain": 1.0,
            "score_gain": 3**-0.5,
            "aggregation_gain": 1.0,
            "selection_temperature": 1.0,
            "learnable_temperature": False,
            "gate_per_scale": False,
            "mask_question_padding": False,
            "mask_empty_chunks": False,
            "unused_projections": True,
        }
        return cls(
            vision_config=vision,
            tokenizer_config=Mu2TokenizerConfig(**{**quirks, **(tokenizer_config or {})}),
            text_config=text_config,
            image_placement="second_position",
            preset="legacy",
            **fields,
        )

    @classmethod
    def ablation(cls, name: str, *, tokenizer_config: dict[str, Any] | None = None, **fields: Any) -> "Mu2Config":
        """One of the five named configs of the ablation: "baseline", "+RPE", "+DTS", "+DMTP", "full"."""
        if name not in ABLATIONS:
            raise ValueError(f"no ablation is called {name!r}; there are {', '.join(ABLATIONS)}")
        relative, soft, gated = ABLATIONS[name]
        switches = {
            "positions": "relative" if relative else "none",
            "selection": "soft" if soft else "hard",
            "gated_pooling": gated,
        }
        return cls(tokenizer_config=Mu2TokenizerConfig(**{**(tokenizer_config or {}), **switches}), **fields)
