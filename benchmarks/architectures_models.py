"""Tiny models of every architecture that transformers has, made from its own settings by one rule for all.

The default settings of a model type are shrunk by the names of the numbers: widths to 64, heads to 4, layers to one of
each kind. What the rule makes unusable is corrected in EXCEPTIONS. Weights are random, seeded, and large enough that
the outputs depend on all of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

WIDTH, HEADS, INNER, VOCABULARY, EXPERTS = 64, 4, 128, 256, 4
IMAGE, PATCH = 32, 8  # pixels along each side
MOST_LAYERS = 4
LARGEST = 5_000_000  # parameters, 20 MB in float32
TOKENS = 24

KINDS = {  # kind -> transformers' tables of the classes for it, the preferred class first
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
    "audio-language": ("MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "text": ("CAUSAL_LM",),
    "encoder": ("MASKED_LM",),
}
# Encoders without a head that text, image or audio models are made of; further ones are parts of models above.
ENCODERS = """
clip clip_text_model clip_vision_model siglip siglip2 siglip_vision_model siglip2_vision_model chinese_clip altclip
metaclip_2 aimv2 blip_2_qformer bridgetower flava groupvit dpr bros canine layoutlmv3 lilt lxmert markuplm splinter
visual_bert vilt vit vit_mae vit_msn deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit ijepa videomae
vivit timesformer vjepa2 yolos pixtral mlcd_vision_model swin swinv2 wav2vec2 wav2vec2-bert wav2vec2-conformer hubert
wavlm unispeech unispeech-sat sew sew-d data2vec-audio audio-spectrogram-transformer parakeet_ctc parakeet_encoder
lasr_encoder qwen2_audio_encoder voxtral_encoder audioflamingo3_encoder imagegpt decision_transformer owlvit
embedding_gemma2 openai_privacy_filter xclip clipseg tipsv2 mimi
"""

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


# The first entry that matches a name decides. Numbers are only ever made smaller.
RULES: list[tuple[str, Rule]] = [
    (
        r"chunk_size_feed_forward|num_labels|pretraining_tp|num_channels|in_channels$|type_vocab|ignore|kpool",
        lambda n: n,
    ),
    (r"upsample_groups", _at_most(WIDTH)),
    (r"num_filters", _at_most(8)),
    (r"(ngram|codebook)_(vocab_)?size|codebook_size|num_embeddings$", _at_most(64)),
    (r"vocab", _at_most(VOCABULARY)),
    (r"experts_per_tok|(?<!index_)top_?k$|moe_k$|num_selected_experts|cross_attn_k$", _at_most(2)),
    (r"shared_experts?$|topk_group|n_group$|num_expert_group|num_limited_groups|expert_group", _at_most(1)),
    (r"experts?$|experts_(?!inter|size)|zero_expert_num", _at_most(EXPERTS)),
    (r"kv_heads|key_value_heads|kv_n_heads|num_key_heads|query_groups", _at_most(2)),
    (r"num_value_heads|n_heads?$|heads$|num_heads", _at_most(HEADS)),
    (r"rotary_dim", _at_most(8)),
    (r"qk_head_dim|swa_head_dim", _at_most(2 * WIDTH // HEADS)),
    (r"head_dim|d_kv$|head_size|kv_channels|dim_head|d_head|query_pre_attn_scalar", _at_most(WIDTH // HEADS)),
    (r"lora_rank|lowrank|_rank$", _at_most(WIDTH // 2)),
    (r"feat_extract|stages|conv_(layers|dim|stride|kernel)$|upsampl|downsampl", lambda n: n),
    (r"kernel|stride|dilation|ratio", lambda n: n),
    (r"index_topk$", _at_most(16)),
    (r"n_groups$", _at_most(2)),
    (r"first_k_dense|dense_layers|attn_layer_offset|expert_layer_offset", _at_most(1)),
    (r"kv_shared_layers|nextn|mtp|num_adapter_layers", lambda n: 0),
    (r"layer_period|interval|sparse_step|layer_step|window_pattern|cross_attention_frequency|every_n", _at_most(2)),
    (r"layers?$|depth$|n_layer$|num_blocks$|num_hidden_groups", _at_most(2)),
    (r"inter(mediate)?_size|ffn|d_ff$|dff$|dim_ff$|inner", _at_most(INNER)),
    (r"feed_?forward_(size|dim)|mlp_dim", _at_most(INNER)),
    (r"image_size|crop_size|resolution", _at_most(IMAGE)),
    (r"num_mel_bins|mel_dim", _at_most(16)),
    (r"^patch_size|[^l]_patch_size", _at_most(PATCH)),
    (r"state_size|d_state$", _at_most(16)),
    (r"chunk_size|window|attention_window|block_size|local_attention", _at_most(16)),
    (r"max_source_positions", _at_most(32)),
    (r"position|n_ctx|seq_len|max_length|max_pos|rel_extent", _at_most(VOCABULARY)),
    (r"(^|_)(hidden|embedding|embed|proj|projection|model|d_model|width|n_embd|embd|emb)(_|$)", _at_most(WIDTH)),
    (r"hidden_size|d_model|dim$|_size$|channels|n_embd|units$|features$", _at_most(WIDTH)),
    (r"num_query|latents|query_num|query_tokens", _at_most(8)),
]

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_HEAD = {"head_dim": WIDTH // HEADS}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
_INDEXER |= {"indexer_compress_ratio": 4, "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64}
_DEEPSEEK = {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1}
_DEEPSEEK_V2 = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1}
_VQ = {"num_res_blocks": 1, "base_channels": 32, "channel_multiplier": [1, 1]}
_TOKENS = {"<image>": 255, "a": 5, "b": 6, "IMGIMGA": 7}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}
_MROPE_HALF = {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}
_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 4, "image_size": 64}
_SWIN |= {"patch_size": 2}
# Corrections of the shrunk settings, by model type; a nested dict corrects the settings of a part.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 255},
    "chameleon": {"vocabulary_map": _TOKENS, "image_token_id": 255, "vq_config": _VQ},
    "cohere_compass": {"text_config": _ROPES},
    "cohere_compass_text": _ROPES,
    "deepseek_ocr2": {"text_config": _DEEPSEEK},
    "deepseek_v2": _DEEPSEEK_V2,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": _TOKENS, "vq_config": _VQ},
    "ernie4_5_vl_moe": {"text_config": _HEAD | {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 32, "pad_token_id": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "funnel": {"d_inner": INNER},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": _MROPE_HALF,
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0] * 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl": {"text_config": _HEAD | {"rope_parameters": {"xdrope_section": [2, 2, 2, 2]}}},
    "inkling2": {"quantization_config": None},
    "instructblip": {"image_token_index": 255},
    "instructblipvideo": {"video_token_index": 255},
    "janus": {"vq_config": _VQ},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": _HEAD,
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32},
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni": {"enable_audio_output": False, "thinker_config": _MROPE},
    "qwen2_5_omni_thinker": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
    | {"attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128, "mamba_headdim": 32},
}


class Subject(NamedTuple):
    """A model type: which class of transformers it is tried with, and what kind of model that is."""

    model_type: str
    kind: str
    class_name: str


def subjects() -> list[Subject]:
    """All model types that are tried, in the order of their kinds and names."""
    found: dict[str, Subject] = {}
    for kind, tables in KINDS.items():
        for table in tables:
            for model_type, name in sorted(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items()):
                name = name if isinstance(name, str) else name[0]
                if model_type in CONFIG_MAPPING:
                    found.setdefault(model_type, Subject(model_type, kind, name))
    for model_type in ENCODERS.split():
        if name := modeling_auto.MODEL_MAPPING_NAMES.get(model_type):
            name = name if isinstance(name, str) else name[0]
            found.setdefault(model_type, Subject(model_type, "encoder", name))
    return list(found.values())


def settings_of(model_type: str) -> Any:
    """The shrunk settings of a model type."""
    kind = CONFIG_MAPPING[model_type]
    values = _shrunk(kind().to_dict())
    for unwanted in ("transformers_version", "architectures", "dtype"):
        values.pop(unwanted, None)
    return kind.from_dict(_merged(values, EXCEPTIONS.get(model_type, {})))


def _merged(values: dict[str, Any], corrections: dict[str, Any]) -> dict[str, Any]:
    for name, value in corrections.items():
        nested = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = _merged(values[name], value) if nested else value
    return values


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """One level of settings, with its nested parts."""
    chosen, length = _layers(values)
    ids = _Ids()
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if name in _DERIVED:
            continue
        if name == "per_layer_config" and value:
            result[name] = {chosen.index(int(i)): _shrunk(each) for i, each in value.items() if int(i) in chosen}
        elif isinstance(value, dict):
            result[key] = _rope(value) if "rope" in name else _shrunk(value)
        elif isinstance(value, list | tuple):
            result[key] = _short(name, list(value), chosen, length, ids)
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = ids.of(value) if _IS_ID.search(name) else smaller(name, value)
            if chosen and value == length and re.search(r"layers$|depth$", name):
                result[key] = len(chosen)
        else:
            result[key] = value
    for name in result:
        queries = str(name).replace("key_value", "attention")
        if queries != name and queries in values and values[name] == values[queries]:
            result[name] = result[queries]
    return result


_DERIVED = ("out_features", "out_indices", "stage_names", "id2label", "label2id", "quantization_config")


_IS_ID = re.compile(r"((?<!per_)token|_token_id|_token_index|token_ids|_idx|_index|_id|_ids)$")


class _Ids:
    """Token ids within the vocabulary; different ones stay different."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def of(self, value: int) -> int:
        if value < VOCABULARY - 56:
            return value
        return self.known.setdefault(value, VOCABULARY - 1 - len(self.known))


def smaller(name: str, value: int) -> int:
    """A number of the settings, as small as its name allows."""
    if value <= 1:
        return value
    return next((rule(value) for pattern, rule in RULES if re.search(pattern, name)), value)


def _layers(values: dict[str, Any]) -> tuple[list[int], int]:
    """One layer of each kind, if lists say which kind each layer is; and the number of layers now."""
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
    length = next((values[name] for name in names if isinstance(values.get(name), int)), 0)
    lists = [value for name, value in values.items() if _per_layer(value, length)]
    if length < 2 or not lists:
        return [], length
    kinds: dict[str, int] = {}
    for layer in range(length):
        kinds.setdefault(str([value[layer] for value in lists]), layer)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    return (chosen if len(chosen) > 1 else [*chosen, length - 1]), length


def _per_layer(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length > 1 and not isinstance(value[0], list | tuple)


def _short(name: str, value: list[Any], chosen: list[int], length: int, ids: _Ids) -> list[Any]:
    if _IS_ID.search(name) and all(isinstance(each, int) for each in value):
        return [ids.of(each) for each in value]
    if chosen and _per_layer(value, length):
        return [smaller(name, value[i]) if type(value[i]) is int else value[i] for i in chosen]
    numbers = all(type(each) is int for each in value)
    if value and numbers and re.search(r"index|idx|indices|_layers$|_ids$|features$", name):
        return [i for i in value if i < (len(chosen) or 2)] or [1]
    if numbers:
        return [smaller(name, each) for each in value]
    return [_shrunk(each) if isinstance(each, dict) else each for each in value]


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings: sections of a head, which add up to half of it."""
    result = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            result[name] = _rope(value)
        elif name == "mrope_section":
            half = WIDTH // HEADS // 2
            parts = [max(1, each * half // sum(value)) for each in value]
            result[name] = [half - sum(parts[1:]), *parts[1:]]
    return result


def build(subject: Subject) -> Any:
    """A model with seeded random weights, in float32 on the CPU.

    Raises:
        Exception: whatever transformers raises for the settings; ValueError if the model is not small.
    """
    import transformers

    kind = getattr(transformers, subject.class_name)
    settings = settings_of(subject.model_type)
    with torch.device("meta"):
        count = sum(value.numel() for value in kind._from_config(settings).parameters())
    if count > LARGEST:
        raise ValueError(f"not small: {count:,} parameters")
    torch.manual_seed(0)
    model = kind._from_config(settings_of(subject.model_type), dtype=torch.float32).eval()
    fill(model)
    return model


@torch.no_grad()
def fill(model: Any) -> None:
    """Random weights: matrices that keep the size of their input, norms near one, and biases that are seen."""
    generator = torch.Generator().manual_seed(1)

    def normal(value: Tensor, scale: float) -> None:
        value.copy_(torch.randn(value.shape, generator=generator) * scale)

    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                normal(value, value.shape[1] ** -0.5)
            elif isinstance(module, Conv1D) and name == "weight":
                normal(value, value.shape[0] ** -0.5)
            elif isinstance(module, nn.Embedding) and "Sinusoidal" not in type(module).__name__:
                normal(value, 1.0)
            elif value.dim() == 3 and "expert" in type(module).__name__.lower():
                normal(value, min(value.shape[1:]) ** -0.5)
            elif name == "bias":
                normal(value, 0.1)
            elif value.dim() >= 2 and value.std() < 0.05 and not isinstance(module, nn.Embedding):
                normal(value, value[0].numel() ** -0.5)


def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, one after the other, until the model takes one."""
    taken = inspect.signature(model.forward).parameters
    vocabulary = _setting(model.config.get_text_config(), "vocab_size", VOCABULARY)
    ids = torch.randint(10, min(180, vocabulary), (1, TOKENS), generator=torch.Generator().manual_seed(2))
    text = {"input_ids": ids} if "input_ids" in taken else {}
    decoder = {"decoder_input_ids": ids[:, :12]} if "decoder_input_ids" in taken else {}
    if text:
        yield {**text, **decoder}
        yield text
    if text and "bbox" in taken:
        boxes = torch.arange(4).expand(1, TOKENS, 4).contiguous()
        yield {**text, **decoder, "bbox": boxes}
        yield {**text, "bbox": boxes / 4}
    for each in features(model.config, taken):
        yield {**each, **decoder}
        yield {**each, **text, **decoder}
        token = _setting(model.config, "image_token_id", None) or _setting(model.config, "image_token_index", None)
        for count in (1, 4, 8, 16, 17) if token is not None and text else ():
            with_images = torch.cat([torch.full((1, count), token), ids], 1)
            more = {"qformer_input_ids": ids} if "qformer_input_ids" in taken else {}
            yield {**each, "input_ids": with_images, **more, **decoder}


def features(config: Any, taken: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Images or audio in the shapes that encoders take, for a function with parameters of these names."""
    yield from _images(config, taken)
    yield from _audio(config, taken)


def _images(config: Any, taken: Collection[str]) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    name = next((each for each in ("pixel_values", "pixel_values_videos") if each in taken), None)
    if name is None:
        return
    size = _setting(config, "image_size", IMAGE)
    size = size if isinstance(size, int) else size[0] if isinstance(size, list | tuple) else IMAGE
    patch = _setting(config, "patch_size", PATCH)
    patch = patch if isinstance(patch, int) else PATCH
    temporal = _setting(config, "temporal_patch_size", 2)
    image = torch.randn(1, 3, size, size, generator=generator)
    sizes = {"image_sizes": torch.tensor([[size, size]])} if "image_sizes" in taken else {}
    if "spatial_shapes" in taken:
        flat = torch.randn(1, 16, 3 * patch * patch, generator=generator)
        mask = torch.ones(1, 16, dtype=torch.long)
        yield {name: flat, "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": mask}
    grids = [each for each in ("image_grid_thw", "grid_thw", "image_grid_hws") if each in taken]
    for grid in grids:
        flat = torch.randn(16, 3 * temporal * patch * patch, generator=generator)
        where = torch.tensor([[1, 4, 4]]) if "hws" not in grid else torch.tensor([[4, 4]])
        yield {name: flat, grid: where}
        yield {name: flat[:, : 3 * patch * patch], grid: where}
    yield {name: image, **sizes}
    yield {name: image[None], **sizes}
    yield {name: image[None].expand(1, 2, -1, -1, -1).contiguous(), **sizes}
    frames = _setting(config, "num_frames", 2)
    yield {name: image[None].expand(1, frames, -1, -1, -1).contiguous(), **sizes}


def _audio(config: Any, taken: Collection[str]) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    bins = _setting(config, "num_mel_bins", None) or _setting(config, "input_feat_per_channel", 16)
    frames = 2 * _setting(config, "max_source_positions", 32)
    if "input_values" in taken:
        yield {"input_values": torch.randn(1, 4000, generator=generator)}
        yield {"input_values": torch.randn(1, 1, 4000, generator=generator)}
        yield {"input_values": torch.randn(1, _setting(config, "max_length", 64), bins, generator=generator)}
    if "input_features" in taken:
        mask = next((each for each in ("feature_attention_mask", "input_features_mask") if each in taken), None)
        masks = {mask: torch.ones(1, frames, dtype=torch.long)} if mask else {}
        for shape in ((1, bins, frames), (1, frames, bins), (bins, frames)):
            yield {"input_features": torch.randn(shape, generator=generator)}
            if mask:
                yield {"input_features": torch.randn(shape, generator=generator), **masks}
        for width in (WIDTH, 160):
            yield {"input_features": torch.randn(1, frames, width, generator=generator)}


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of the model or of any of its parts."""
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    return next((found for part in parts if part is not None and (found := _setting(part, name, None))), default)
