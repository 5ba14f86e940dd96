"""Published checkpoints to ours, strictly: a tensor that is unexpected, missing or mis-shaped is an error that names it.

Reads the folders of the released u2Llama and u2Qwen3 models (one weights file or many, safetensors or pickles) and the
vision tower alone (`pretrained_ViT.bin`). Sizes come from the tensors, switches from config.json; which attention a checkpoint
has is certain from its keys: `relative_bias` is relative, `wq` without it rotary, `in_proj_weight` plain attention.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mu2_model.configuration_mu2 import Mu2Config, Mu2VisionConfig
from mu2_model.errors import CheckpointError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.processing_mu2 import IMAGE_TOKEN, Mu2Processor
from mu2_model.published_files import read_published_config, read_tensor_file, read_tensors
from mu2_model.stored_weights import BROKEN_CONFIG, WEIGHT_TYPES, check_names, skeleton
from mu2_model.vision_tower import Mu2VisionTower

TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {"u2llama": LlamaConfig, "u2qwen3": Qwen3Config}
Attention = Literal["relative", "rotary", "first_axis"]

VISION_HEAD_WIDTH = 64
PUBLISHED_SLICES = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Keys of config.json that describe the image side; the rest belongs to the language model.
IMAGE_KEYS = re.compile(
    r"^(image_|patch_size|vision_|mm_|proj_|u2t_|enable_|use_multi_scale|num_3d_|attn_type|freeze_|tune_)"
)
DROPPED_KEYS = (
    "model_type",
    "architectures",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
)

VISION_PREFIX = "model.vision_tower.vision_tower."
VISION_NAMES = (
    (r"^patch_embedding\.position_embeddings$", "position_embedding"),
    (r"^patch_embedding\.patch_embeddings\.1\.", "patch_embedding."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.out_proj\.", ".output."),
    (r"\.mlp\.linear([12])\.", r".fc\1."),
)
PROJECTIONS = {"wq": "query", "wk": "key", "wv": "value", "dense": "output", "out_proj": "output"}
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.mm_projector\.projector\.0\.", "model.projector.fc1."),
    (r"^model\.mm_projector\.projector\.2\.", "model.projector.fc2."),
    (r"^model\.u2tokenizer\.", "model.visual_tokenizer."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
    (r"tokenizer\.query_tokens$", "tokenizer.aggregator.query_tokens"),
    (r"\.svt_module\.attention_network\.", ".refiner."),
    (r"\.svt_module\.token_selection\.score_net\.", ".selection.score."),
    (r"\.svt_module\.dynamic_pool\.gate_fc\.", ".pooling.gate."),
    (r"\.tta_module\.layers_vt\.", ".aggregator.layers."),
    (r"\.tta_module\.layer_linagg\.linear_aggregator\.", ".aggregator.aggregation."),
    (r"\.(spatial|temporal|self)_attention\.", r".\1_attention.attention."),
    (r"\.visual_cross_attention\.", ".visual_attention."),
    (r"\.text_cross_attention\.", ".question_attention."),
    (r"\.norm_cross_v\.", ".visual_norm."),
    (r"\.norm_cross_t\.", ".question_norm."),
    (r"\.norm_self\.", ".self_norm."),
)


def convert_checkpoint(
    src: Path | str, dst: Path | str, question_padding: int | None = None
) -> Mu2Config | Mu2VisionConfig:
    """Convert a published checkpoint folder, or the file of a vision tower alone, into the folder `dst`.

    `question_padding` is what the model was trained with: None for Qwen3 checkpoints, 768 or 1024 for those of 2025 on
    Llama. A folder without a tokenizer gives weights and image processor only, which a drafter refuses. Raises
    CheckpointError for anything that is not exactly as published. Returns the config that was written.
    """
    src, dst = Path(src), empty_folder(Path(dst))
    if question_padding is not None and question_padding < 1:
        raise CheckpointError(f"questions cannot be padded to {question_padding} tokens")
    if src.is_file():
        return convert_vision_tower(src, dst)
    published = read_published_config(src)
    raw = read_tensors(src)
    attention = attention_kind(raw)
    tensors = {our_name(name): tensor for name, tensor in split_packed(raw)}
    try:
        text_config = read_text_config(published, tensors)
        tokenizer = read_tokenizer(src, text_config)
        image_token: Any = 0 if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config = legacy_config(published, text_config, attention, tensors, int(image_token), src.name)
    except CheckpointError:
        raise
    except BROKEN_CONFIG as error:
        raise CheckpointError(f"config.json and the tensors do not fit together: {error}") from error
    untie(tensors, config)
    model = skeleton(config)
    check_tensors(tensors, model.state_dict(), config.tie_word_embeddings)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if (src / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(src)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"generation_config.json of {src} cannot be read: {error}") from error
    with writing(dst):
        model.save_pretrained(dst)
        published_processor(config, tokenizer, question_padding).save_pretrained(dst)
    return config


def published_processor(
    config: Mu2Config, tokenizer: PreTrainedTokenizerBase | None, question_padding: int | None
) -> Mu2Processor | Mu2ImageProcessor:
    """What makes a converted model's input: its images alone, where the checkpoint came without a tokenizer."""
    size = config.vision.image_size
    image = Mu2ImageProcessor(size[1], size[0], max(PUBLISHED_SLICES // size[0], 1) * size[0], form="published")
    if tokenizer is None:
        return image
    queries = config.tokenizer.num_query_tokens
    return Mu2Processor(
        image, tokenizer, num_image_tokens=queries, prompt_form="published", question_padding=question_padding
    )


def convert_vision_tower(src: Path | str, dst: Path | str) -> Mu2VisionConfig:
    """Convert a vision tower alone (`pretrained_ViT.bin`) into a folder with config.json and model.safetensors.

    Raises CheckpointError unless the file holds exactly the tensors of the published tower.
    """
    dst = empty_folder(Path(dst))
    config, tensors = read_vision_tower(Path(src))
    with writing(dst):
        config.save_pretrained(dst)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, dst / "model.safetensors")
    return config


def empty_folder(dst: Path) -> Path:
    """The folder to write to; CheckpointError when it holds anything, such as the published weights or an older model's files."""
    try:
        taken = dst.exists() and (not dst.is_dir() or any(dst.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{dst} cannot be looked into: {error}") from error
    if taken:
        raise CheckpointError(f"{dst} is not empty: name a new folder, or empty this one")
    return dst


@contextmanager
def writing(dst: Path) -> Iterator[None]:
    """Make the folder for what is written to it; CheckpointError when that cannot be."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{dst} cannot be written: {error}") from error


def load_vision_tower(tower: Mu2VisionTower, src: Path | str) -> None:
    """Load a published vision tower strictly; one channel is repeated over the tower's channels and divided by their number."""
    _, tensors = read_vision_tower(Path(src))
    name, channels = "patch_embedding.weight", tower.num_channels
    tensors[name] = tensors[name].repeat_interleave(channels, dim=1) / channels
    check_tensors(tensors, tower.state_dict())
    tower.load_state_dict(tensors)


def read_vision_tower(file: Path) -> tuple[Mu2VisionConfig, dict[str, Tensor]]:
    """The config and the tensors, under our names, of a published vision tower file."""
    tensors = {vision_name(name): tensor for name, tensor in read_tensor_file(file)}
    voxels = _tensor(tensors, "patch_embedding.weight", 2).shape[1]
    patches = _tensor(tensors, "position_embedding", 3).shape[1]
    # Twice as many patches along rows and columns as along slices, as published (8 x 16 x 16).
    depth = round((patches / 4) ** (1 / 3))
    if 4 * depth**3 != patches:
        raise CheckpointError(f"mis-shaped tensor: position_embedding of {patches} patches, 8 x 16 x 16 are published")
    published = {"image_size": [depth * 4, depth * 32, depth * 32], "patch_size": [4, 16, 16]}
    if voxels != 4 * 16 * 16:
        raise CheckpointError(
            f"mis-shaped tensor: patch_embedding.weight takes {voxels} voxels, 4 x 16 x 16 are published"
        )
    config = Mu2VisionConfig(**vision_sizes(tensors, "", published))
    with torch.device("meta"):
        expected = Mu2VisionTower(config).state_dict()
    check_tensors(tensors, expected)
    return config, tensors


def read_tokenizer(folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a published checkpoint, None where there is no file of one; CheckpointError without placeholder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=text_config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer of {folder} cannot be read: {error}") from error
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token is None or image_token == tokenizer.unk_token_id:
        raise CheckpointError(f"the tokenizer of {folder} has no token {IMAGE_TOKEN}")
    if image_token >= text_config.vocab_size:
        raise CheckpointError(
            f"{IMAGE_TOKEN} is token {image_token}, but embed_tokens.weight holds {text_config.vocab_size}: "
            "the tokenizer belongs to another vocabulary"
        )
    return tokenizer


def split_packed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Split the packed `in_proj` tensors of plain attention into wq, wk and wv."""
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".in_proj_")
        if not stem:
            yield name, tensor
            continue
        for part, piece in zip(("wq", "wk", "wv"), tensor.chunk(3, dim=0), strict=True):
            yield f"{stem}.{part}.{kind}", piece.contiguous()


def our_name(name: str) -> str:
    """The name of a published tensor in our model; a name that nothing maps comes back unchanged and is then unexpected."""
    if name.startswith(VISION_PREFIX):
        return "model.vision_tower." + vision_name(name.removeprefix(VISION_PREFIX))
    ours = name
    for pattern, replacement in NAMES:
        ours = re.sub(pattern, replacement, ours)
    if ours.startswith("model.visual_tokenizer."):
        ours = re.sub(r"\.(wq|wk|wv|dense|out_proj)\.", lambda match: f".{PROJECTIONS[match.group(1)]}.", ours)
    return ours


def vision_name(name: str) -> str:
    """The name of a tensor of the published vision tower in ours."""
    for pattern, replacement in VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_text_config(published: dict[str, Any], tensors: dict[str, Tensor]) -> PreTrainedConfig:
    """The language model's config: its keys of the flat config.json, its vocabulary from the tensors."""
    fields = {k: v for k, v in published.items() if not IMAGE_KEYS.match(k) and k not in DROPPED_KEYS}
    fields["vocab_size"] = _tensor(tensors, "model.language_model.embed_tokens.weight", 2).shape[0]
    return TEXT_CONFIGS[published["model_type"].lower()](**fields)


def legacy_config(
    published: dict[str, Any],
    text_config: PreTrainedConfig,
    attention: Attention,
    tensors: dict[str, Tensor],
    image_token: int,
    name: str,
) -> Mu2Config:
    """The config of the converted model: switches from config.json, sizes from the tensors."""
    stored = list(published["image_size"])
    bias = "model.visual_tokenizer.refiner.layers.0.spatial_attention.attention.relative_bias"
    pattern = re.compile(r"^model\.visual_tokenizer\.refiner\.layers\.(\d+)\.")
    layers = {match.group(1) for key in tensors if (match := pattern.match(key))}
    tokenizer: dict[str, Any] = {
        "num_attention_heads": published["u2t_num_heads"],
        "num_layers": published.get("u2t_num_layers") or len(layers),
        "num_query_tokens": published.get("num_3d_query_token")
        or _tensor(tensors, "model.visual_tokenizer.aggregator.query_tokens", 3).shape[1],
        "num_selected_tokens": published["u2t_top_k"],
        "projector_pooling_size": published.get("proj_pooling_size") or 2,
    }
    if bias in tensors:
        tokenizer["max_relative_positions"] = (_tensor(tensors, bias, 2).shape[0] + 1) // 2
    return Mu2Config.legacy(
        text_config,
        attention=attention,
        soft_selection=bool(published["enable_diffts"]),
        gated_pooling=bool(published["enable_dmtp"]),
        multi_scale=bool(published["use_multi_scale"]),
        stored_image_size=(stored[0], stored[1], stored[2]),
        vision_config=vision_sizes(tensors, "model.vision_tower.", published),
        tokenizer_config=tokenizer,
        image_token_id=image_token,
        model_name=name,
        model_version="published",
        trained_on="patients",
    )


def attention_kind(tensors: dict[str, Tensor]) -> Attention:
    """Which attention published tensors belong to; the names of `attn_type` and `enable_rpe` in config.json vary."""
    if any(name.endswith(".relative_bias") for name in tensors):
        return "relative"
    return "first_axis" if any(name.endswith(".in_proj_weight") for name in tensors) else "rotary"


def vision_sizes(tensors: dict[str, Tensor], prefix: str, published: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the vision tower from its tensors; the chunk is the stored one with the short axis first."""
    patch = _tensor(tensors, prefix + "patch_embedding.weight", 2)
    blocks = {
        name.split(".")[-3] for name in tensors if re.match(re.escape(prefix) + r"blocks\.\d+\.fc1\.weight$", name)
    }
    first, second, third = published["image_size"]
    return {
        "hidden_size": patch.shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(patch.shape[0] // VISION_HEAD_WIDTH, 1),
        "intermediate_size": _tensor(tensors, prefix + "blocks.0.fc1.weight", 2).shape[0],
        "num_channels": published.get("image_channel") or 1,
        "image_size": [first, second, third] if first <= third else [third, first, second],
        "patch_size": list(published["patch_size"]),
    }


def _tensor(tensors: dict[str, Tensor], name: str, axes: int) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"missing tensor: nothing in the checkpoint maps to {name}")
    if tensors[name].dim() != axes:
        raise CheckpointError(f"mis-shaped tensor: {name} is {tuple(tensors[name].shape)}, {axes} axes are published")
    return tensors[name]


def untie(tensors: dict[str, Tensor], config: Mu2Config) -> None:
    """Take the head out where it is the embeddings again; CheckpointError when a tied head differs from them."""
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    if not torch.equal(tensors["lm_head.weight"], tensors["model.language_model.embed_tokens.weight"]):
        raise CheckpointError(
            "lm_head.weight differs from embed_tokens.weight, but config.json says that they are tied"
        )
    del tensors["lm_head.weight"]


def check_tensors(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], tied: bool = False) -> None:
    """CheckpointError that names the first tensor that is unexpected, missing, mis-shaped or no weight; a tied head is none."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES.values():
            raise CheckpointError(f"{name} holds values of type {tensor.dtype}, which are no weights")
    check_names(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items() if not (tied and name == "lm_head.weight")},
    )
