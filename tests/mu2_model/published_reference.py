"""An independent, naive computation of the published μ²LLM, and synthetic checkpoints of the published layout.

Written from the equations alone with explicit loops over heads, positions, selections and patches, in float64; it shares no
code with `mu2_model`. Letters: B batch, C chunks, N pooled tokens of a chunk, K selected, Q queries, H width.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config


@dataclass(frozen=True)
class Published:
    """Sizes and switches of a synthetic published model."""

    family: str = "u2llama"
    attention: str = "rma"  # rma, rope, mha
    soft: bool = True
    gated: bool = True
    multi_scale: bool = True
    image_size: tuple[int, int, int] = (8, 16, 16)
    patch_size: tuple[int, int, int] = (2, 4, 4)
    chunks: int = 2
    vision_width: int = 128
    vision_layers: int = 2
    vision_mlp: int = 48
    heads: int = 4
    layers: int = 2
    selected: int = 8
    queries: int = 6
    width: int = 32
    vocabulary: int = 40
    bias_reach: int = 32
    tied: bool = False
    extra: dict = field(default_factory=dict)

    @property
    def chunk(self) -> tuple[int, int, int]:
        first, second, third = self.image_size
        return self.image_size if first <= third else (third, first, second)

    def config(self) -> dict:
        """config.json as published: flat."""
        text = self.text_config().to_dict()
        text["rope_theta"] = 10000.0
        text.pop("rope_parameters", None)
        switch = (
            {"attn_type": self.attention} if self.extra.get("newer", True) else {"enable_rpe": self.attention == "rma"}
        )
        return {
            **text,
            "model_type": self.family,
            "architectures": ["u2ForCausalLM"],
            "image_channel": 1,
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
            "vision_tower": "vit3d",
            "vision_select_layer": -1,
            "vision_select_feature": "patch",
            "mm_hidden_size": self.vision_width,
            "mm_projector_type": "spp",
            "proj_layer_type": "mlp",
            "proj_layer_num": 2,
            "proj_pooling_type": "spatial",
            "proj_pooling_size": 2,
            "enable_u2tokenizer": True,
            "u2t_num_heads": self.heads,
            "u2t_num_layers": self.layers,
            "u2t_top_k": self.selected,
            "use_multi_scale": self.multi_scale,
            "num_3d_query_token": self.queries,
            "enable_diffts": self.soft,
            "enable_dmtp": self.gated,
            **switch,
        }

    def text_config(self) -> PreTrainedConfig:
        kind = LlamaConfig if self.family == "u2llama" else Qwen3Config
        return kind(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=self.tied,
        )

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Weights so large that every live tensor and the question move the logits."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

        def linear(name: str, rows: int, columns: int, gain: float = 1.6, bias: bool = True) -> dict[str, Tensor]:
            made = {f"{name}.weight": normal(rows, columns, std=gain / math.sqrt(columns))}
            return {**made, f"{name}.bias": normal(rows, std=0.3)} if bias else made

        def norm(name: str, width: int) -> dict[str, Tensor]:
            return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.2)}

        def attention(name: str, kind: str) -> dict[str, Tensor]:
            if kind == "mha":
                return {
                    f"{name}.in_proj_weight": normal(3 * self.width, self.width, std=2.2 / math.sqrt(self.width)),
                    f"{name}.in_proj_bias": normal(3 * self.width, std=0.3),
                    **linear(f"{name}.out_proj", self.width, self.width, gain=0.8),
                }
            made: dict[str, Tensor] = {}
            sharp = 2.0 if kind == "cross" else 3.0
            for part, gain in (("wq", sharp), ("wk", sharp), ("wv", 1.2), ("dense", 1.2)):
                made |= linear(f"{name}.{part}", self.width, self.width, gain)
            if kind == "rma":
                made[f"{name}.relative_bias"] = normal(2 * self.bias_reach - 1, self.heads, std=1.5)
            return made

        vision, width = self.vision_width, self.width
        patches = math.prod(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        prefix = "model.vision_tower.vision_tower."
        state = {
            f"{prefix}cls_token": normal(1, 1, vision, std=1.0),
            f"{prefix}patch_embedding.position_embeddings": normal(1, patches, vision, std=1.0),
            **linear(f"{prefix}patch_embedding.patch_embeddings.1", vision, math.prod(self.patch_size), gain=3.0),
            **norm(f"{prefix}norm", vision),
        }
        for index in range(self.vision_layers):
            block = f"{prefix}blocks.{index}."
            state |= norm(f"{block}norm1", vision) | norm(f"{block}norm2", vision)
            state |= linear(f"{block}attn.qkv", 3 * vision, vision, bias=False)
            state |= linear(f"{block}attn.out_proj", vision, vision)
            state |= linear(f"{block}mlp.linear1", self.vision_mlp, vision)
            state |= linear(f"{block}mlp.linear2", vision, self.vision_mlp)
        state |= linear("model.mm_projector.projector.0", width, vision)
        state |= linear("model.mm_projector.projector.2", width, width, gain=2.5)
        tokenizer = "model.u2tokenizer."
        state[f"{tokenizer}query_tokens"] = normal(1, self.queries, width, std=1.0)
        for index in range(self.layers):
            layer = f"{tokenizer}svt_module.attention_network.layers.{index}."
            state |= attention(f"{layer}spatial_attention", self.attention)
            state |= attention(f"{layer}temporal_attention", self.attention)
        state |= linear(
            f"{tokenizer}svt_module.token_selection.score_net", self.selected if self.soft else 1, width, 2.5
        )
        if self.gated:
            state |= linear(f"{tokenizer}svt_module.dynamic_pool.gate_fc", 1, width)
        for index in range(self.layers):
            layer = f"{tokenizer}tta_module.layers_vt.{index}."
            state |= attention(f"{layer}self_attention", self.attention)
            state |= attention(f"{layer}visual_cross_attention", "cross") | attention(
                f"{layer}text_cross_attention", "cross"
            )
            for name in ("norm_cross_v", "norm_cross_t", "norm_self"):
                state |= norm(f"{layer}{name}", width)
        state |= attention(f"{tokenizer}tta_module.layer_linagg.linear_aggregator", "cross")
        return self._spread(state | self._language_model(generator))

    def _spread(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Set the projector so that tokens have mean 0 and deviation 1: their common mean would drown all that follows."""
        pixels = torch.rand(4, *self.chunk, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        reference = Reference(self, state)
        tokens = torch.cat([reference.project(reference.vision(chunk)) for chunk in pixels])
        last = "model.mm_projector.projector.2"
        bias = (state[f"{last}.bias"] - tokens.mean(0)) / tokens.std(0)
        return state | {f"{last}.weight": state[f"{last}.weight"] / tokens.std(0)[:, None], f"{last}.bias": bias}

    def _language_model(self, generator: torch.Generator) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_config(self.text_config(), dtype=torch.float64)
        state = {}
        for name, tensor in model.state_dict().items():
            gain = 1.6 / math.sqrt(tensor.shape[-1]) if tensor.ndim == 2 else 0.2
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * gain
            state[name] = noise if tensor.ndim == 2 else 1 + noise
        if self.tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        return state


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word-level tokenizer with the published placeholder, without a beginning-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<|im_end|>", "<im_patch>", *(f"w{index}" for index in range(vocabulary - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<im_patch>"],
    ).save_pretrained(folder)


def write_checkpoint(folder: Path, published: Published, tensors: dict[str, Tensor], form: str = "safetensors") -> Path:
    """A checkpoint folder as published; `form`: safetensors, bin, sharded, sharded_bin."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published.config()))
    write_tokenizer(folder, published.vocabulary)
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        for index, part in enumerate(halves, start=1):
            chosen = {name: tensors[name] for name in part}
            if form == "sharded":
                save_file(chosen, folder / f"model-0000{index}-of-00002.safetensors")
            else:
                torch.save(chosen, folder / f"pytorch_model-0000{index}-of-00002.bin")
    return folder


class Reference:
    """The published forward path over a state dict; every stage is a method."""

    def __init__(self, published: Published, state: dict[str, Tensor]):
        self.p, self.state = published, state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self[f"{name}.weight"].T
        return out + self[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self[f"{name}.weight"] + self[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def vision(self, chunk: Tensor) -> Tensor:
        """One chunk (D, H, W) to patch tokens (P, W)."""
        prefix = "model.vision_tower.vision_tower."
        p1, p2, p3 = self.p.patch_size
        vectors = []
        for d in range(chunk.shape[0] // p1):
            for h in range(chunk.shape[1] // p2):
                for w in range(chunk.shape[2] // p3):
                    box = chunk[d * p1 : (d + 1) * p1, h * p2 : (h + 1) * p2, w * p3 : (w + 1) * p3]
                    vectors.append(torch.stack([box[a, b, c] for a in range(p1) for b in range(p2) for c in range(p3)]))
        x = self.linear(torch.stack(vectors), f"{prefix}patch_embedding.patch_embeddings.1")
        x = x + self[f"{prefix}patch_embedding.position_embeddings"][0]
        x = torch.cat([self[f"{prefix}cls_token"][0], x])
        for index in range(self.p.vision_layers):
            block = f"{prefix}blocks.{index}."
            x = x + self.linear(self.vision_attention(self.norm(x, f"{block}norm1"), block), f"{block}attn.out_proj")
            hidden = self.gelu(self.linear(self.norm(x, f"{block}norm2"), f"{block}mlp.linear1"))
            x = x + self.linear(hidden, f"{block}mlp.linear2")
        return self.norm(x, f"{prefix}norm")[1:]

    def vision_attention(self, x: Tensor, block: str) -> Tensor:
        width = self.p.vision_width
        qkv = self.linear(x, f"{block}attn.qkv")
        heads = []
        for head in range(width // 64):
            part = slice(head * 64, (head + 1) * 64)
            q, k, v = qkv[:, :width][:, part], qkv[:, width : 2 * width][:, part], qkv[:, 2 * width :][:, part]
            heads.append(torch.softmax(q @ k.T / 8.0, dim=-1) @ v)
        return torch.cat(heads, dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        """(P, W) to (N, H): pool the grid that config.json says, in its order."""
        d, h, w = (size // patch for size, patch in zip(self.p.image_size, self.p.patch_size, strict=True))
        grid = tokens.reshape(d, h, w, -1)
        pooled = []
        for a in range(0, d, 2):
            for b in range(0, h, 2):
                for c in range(0, w, 2):
                    pooled.append(grid[a : a + 2, b : b + 2, c : c + 2].reshape(8, -1).mean(0))
        return self.linear(self.gelu(self.linear(torch.stack(pooled), "model.mm_projector.projector.0")),
                           "model.mm_projector.projector.2")  # fmt: skip

    def attend(self, query: Tensor, memory: Tensor, name: str, kind: str = "cross", raw_values: bool = False) -> Tensor:
        """Multi-head attention of (S, H) to (T, H), scores materialised, one head after the other."""
        q, k = self.linear(query, f"{name}.wq"), self.linear(memory, f"{name}.wk")
        v = memory if raw_values else self.linear(memory, f"{name}.wv")
        depth = self.p.width // self.p.heads
        heads = []
        for head in range(self.p.heads):
            part = slice(head * depth, (head + 1) * depth)
            qh, kh = q[:, part], k[:, part]
            if kind == "rope":
                qh, kh = self.rotary(qh), self.rotary(kh)
            scores = qh @ kh.T / math.sqrt(depth)
            if kind == "rma":
                table = self[f"{name}.relative_bias"]
                centre = (table.shape[0] - 1) // 2
                for i in range(scores.shape[0]):
                    for j in range(scores.shape[1]):
                        scores[i, j] = scores[i, j] + table[j - i + centre, head]
            heads.append(torch.softmax(scores, dim=-1) @ v[:, part])
        out = torch.cat(heads, dim=-1)
        return out if raw_values else self.linear(out, f"{name}.dense")

    @staticmethod
    def rotary(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        out = torch.empty_like(x)
        for position in range(x.shape[0]):
            for index in range(half):
                angle = position * 10000.0 ** (-2 * index / x.shape[1])
                a, b = x[position, index], x[position, index + half]
                out[position, index] = a * math.cos(angle) - b * math.sin(angle)
                out[position, index + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def self_attend(self, x: Tensor, name: str) -> Tensor:
        """Self-attention of a batch (B, S, H); plain attention is torch's own, fed batch-first although it is not."""
        if self.p.attention != "mha":
            return torch.stack([self.attend(row, row, name, self.p.attention) for row in x])
        module = torch.nn.MultiheadAttention(self.p.width, self.p.heads, dtype=torch.float64)
        with torch.no_grad():
            module.in_proj_weight.copy_(self[f"{name}.in_proj_weight"])
            module.in_proj_bias.copy_(self[f"{name}.in_proj_bias"])
            module.out_proj.weight.copy_(self[f"{name}.out_proj.weight"])
            module.out_proj.bias.copy_(self[f"{name}.out_proj.bias"])
            return module(x, x, x)[0]

    def refine(self, x: Tensor) -> Tensor:
        """(B, C, N, H), every sublayer replaces its input."""
        batch, chunks, count, width = x.shape
        for index in range(self.p.layers):
            layer = f"model.u2tokenizer.svt_module.attention_network.layers.{index}."
            x = self.self_attend(x.reshape(batch * chunks, count, width), f"{layer}spatial_attention")
            x = x.reshape(batch, chunks, count, width).permute(0, 2, 1, 3).reshape(batch * count, chunks, width)
            x = self.self_attend(x, f"{layer}temporal_attention")
            x = x.reshape(batch, count, chunks, width).permute(0, 2, 1, 3)
        return x

    def select(self, x: Tensor) -> Tensor:
        """(B, C, N, H) to (B, K, H)."""
        rows = []
        for tokens in x.reshape(x.shape[0], -1, x.shape[-1]):
            scores = self.linear(tokens, "model.u2tokenizer.svt_module.token_selection.score_net")
            if self.p.soft:
                weights = [torch.softmax(scores[:, k], dim=0) for k in range(self.p.selected)]
                rows.append(torch.stack([(weight[:, None] * tokens).sum(0) for weight in weights]))
            else:
                order = sorted(range(len(tokens)), key=lambda index: -float(scores[index, 0]))
                rows.append(torch.stack([tokens[index] for index in order[: self.p.selected]]))
        return torch.stack(rows)

    def pool(self, x: Tensor) -> Tensor:
        """(B, K, H) to (B, V, H)."""
        if not self.p.multi_scale:
            return x
        rows = []
        for tokens in x:
            pooled = []
            for scale in (1, 2, 4):
                starts = range(0, len(tokens) - scale + 1, scale)
                pooled.append(torch.stack([tokens[start : start + scale].mean(0) for start in starts]))
            if self.p.gated:
                gate = "model.u2tokenizer.svt_module.dynamic_pool.gate_fc"
                logits = torch.cat([self.linear(part.mean(0), gate) for part in pooled])
                gates = torch.softmax(logits, dim=0)
                pooled = [part * weight for part, weight in zip(pooled, gates, strict=True)]
            rows.append(torch.cat(pooled))
        return torch.stack(rows)

    def aggregate(self, visual: Tensor, question: Tensor) -> Tensor:
        """(B, V, H) and (B, T, H) to (B, Q, H)."""
        query = self["model.u2tokenizer.query_tokens"].expand(visual.shape[0], -1, -1)
        for index in range(self.p.layers):
            layer = f"model.u2tokenizer.tta_module.layers_vt.{index}."
            query = self.norm(query + self.self_attend(query, f"{layer}self_attention"), f"{layer}norm_self")
            seen = [self.attend(q, v, f"{layer}visual_cross_attention") for q, v in zip(query, visual, strict=True)]
            query = self.norm(query + torch.stack(seen), f"{layer}norm_cross_v")
            read = [self.attend(q, t, f"{layer}text_cross_attention") for q, t in zip(query, question, strict=True)]
            query = self.norm(query + torch.stack(read), f"{layer}norm_cross_t")
        name = "model.u2tokenizer.tta_module.layer_linagg.linear_aggregator"
        return torch.stack([self.attend(q, v, name, raw_values=True) for q, v in zip(query, visual, strict=True)])

    def stages(self, pixels: Tensor, question_ids: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """All stages for pixels (B, C, D, H, W) and ids (B, T), (B, S)."""
        batch, chunks = pixels.shape[:2]
        vision = torch.stack([self.vision(chunk) for chunk in pixels.flatten(0, 1)])
        projected = torch.stack([self.project(tokens) for tokens in vision]).unflatten(0, (batch, chunks))
        refined = self.refine(projected)
        selected = self.select(refined)
        visual = self.pool(selected)
        embeddings = self["model.embed_tokens.weight"]
        tokens = self.aggregate(visual, embeddings[question_ids])
        prompt = embeddings[input_ids]
        prompt = torch.cat([prompt[:, :1], tokens, prompt[:, self.p.queries + 1 :]], dim=1)
        return {
            "vision": vision,
            "projected": projected,
            "refined": refined,
            "selected": selected,
            "visual": visual,
            "tokens": tokens,
            "logits": self.language_model(prompt),
        }

    def language_model(self, inputs_embeds: Tensor) -> Tensor:
        model = AutoModelForCausalLM.from_config(self.p.text_config(), dtype=torch.float64)
        model.load_state_dict({name: self[name] for name in model.state_dict()})
        with torch.no_grad():
            return model(inputs_embeds=inputs_embeds).logits
