"""Tiny transformers models, grouped by head. docs/reference/architectures.md lists them."""

from typing import Any, NamedTuple

_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 32}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_positions": 32}
_BERT = {**_TEXT, "max_position_embeddings": 32}
_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
_SHARED = {**_LATENT, "n_shared_experts": 1, "pad_token_id": 0}
_STAGES = {"num_channels": 3, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "patch_size": 2}
_PAIR = {"text_config": _BERT, "vision_config": _IMAGE}
_PATCHES = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 4,
    "out_hidden_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
}
_DEEP_PATCHES = {**_PATCHES, "deepstack_visual_indexes": [0]}


class Architecture(NamedTuple):
    """A transformers class and the settings of a small model."""

    kind: str
    config: str
    model: str
    settings: dict[str, Any]
    common: bool = False
    """Whether `make test` tries it, too; the others only `make test-all`."""


def _causal(name: str, settings: dict[str, Any], config: str | None = None, *, common: bool = False) -> Architecture:
    return Architecture("causal", f"{config or name}Config", f"{name}ForCausalLM", settings, common)


def _masked(name: str, settings: dict[str, Any], *, common: bool = False) -> Architecture:
    return Architecture("masked", f"{name}Config", f"{name}ForMaskedLM", settings, common)


def _sequence(name: str, settings: dict[str, Any], *, common: bool = False) -> Architecture:
    return Architecture("sequence", f"{name}Config", f"{name}ForSequenceClassification", settings, common)


def _image(name: str, settings: dict[str, Any], *, common: bool = False) -> Architecture:
    return Architecture("image", f"{name}Config", f"{name}ForImageClassification", settings, common)


def _pair(name: str, settings: dict[str, Any], model: str | None = None, *, common: bool = False) -> Architecture:
    return Architecture("image and text", f"{name}Config", model or f"{name}Model", settings, common)


def _answer(name: str, settings: dict[str, Any]) -> Architecture:
    return Architecture("image and text", f"{name}Config", f"{name}ForConditionalGeneration", settings)


ARCHITECTURES = [
    _causal("GPT2LMHead", _GPT2)._replace(config="GPT2Config", model="GPT2LMHeadModel"),
    _causal("GPTNeo", {**_TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    _causal("GPTNeoX", _BERT, common=True),
    _causal("GPTJ", {**_GPT2, "rotary_dim": 4}),
    _causal("GPTBigCode", _GPT2),
    _causal("CodeGen", {**_GPT2, "rotary_dim": 4}),
    _causal("OPT", {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    _causal("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 48}),
    _causal("Falcon", _TEXT),
    _causal("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 48}),
    _causal("Llama", _GROUPED, common=True),
    _causal("Mistral", _GROUPED),
    _causal("Ministral", {**_GROUPED, "head_dim": 4}),
    _causal("Mixtral", {**_GROUPED, "num_local_experts": 4}, common=True),
    _causal("Qwen2", _GROUPED),
    _causal("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 8}),
    _causal("Qwen3", {**_GROUPED, "head_dim": 4}),
    _causal("Qwen3Moe", {**_EXPERTS, "head_dim": 4}),
    _causal("Gemma", {**_GROUPED, "head_dim": 4}),
    _causal("Gemma2", {**_GROUPED, "head_dim": 4}),
    _causal("Gemma3", {**_GROUPED, "head_dim": 4}, "Gemma3Text"),
    _causal("Phi", _GROUPED),
    _causal("Phi3", {**_GROUPED, "pad_token_id": 0}),
    _causal("Phimoe", {**_GROUPED, "num_local_experts": 4}),
    _causal("StableLm", _GROUPED),
    _causal("Starcoder2", _GROUPED),
    _causal("Olmo", {**_GROUPED, "pad_token_id": 0, "eos_token_id": 1}),
    _causal("Olmo2", {**_GROUPED, "pad_token_id": 0, "eos_token_id": 1}),
    _causal("Olmo3", {**_GROUPED, "pad_token_id": 0, "eos_token_id": 1}),
    _causal("Olmoe", {**_EXPERTS, "pad_token_id": 0, "eos_token_id": 1}),
    _causal("FlexOlmo", {**_EXPERTS, "pad_token_id": 0, "eos_token_id": 1}),
    _causal("DeepseekV2", _LATENT),
    _causal("DeepseekV3", _LATENT, common=True),
    _causal("Glm", {**_GROUPED, "head_dim": 4, "pad_token_id": 0}),
    _causal("Glm4", {**_GROUPED, "head_dim": 4, "pad_token_id": 0}),
    _causal("Glm4Moe", {**_LATENT, "head_dim": 4}),
    _causal("Dots1", {**_LATENT, "head_dim": 4, "n_shared_experts": 1}),
    _causal("GptOss", {**_GROUPED, "num_local_experts": 4, "head_dim": 4}),
    _causal("Granite", _GROUPED),
    _causal("GraniteMoe", {**_GROUPED, "num_local_experts": 4}),
    _causal("Cohere", {**_GROUPED, "pad_token_id": 0}),
    _causal("Cohere2", {**_GROUPED, "pad_token_id": 0}),
    _causal("Nemotron", _GROUPED),
    _causal("SmolLM3", {**_GROUPED, "pad_token_id": 0}),
    _causal("Ernie4_5", {**_GROUPED, "head_dim": 4}),
    _causal("Ernie4_5_Moe", {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2}),
    _causal("HunYuanMoEV1", {**_EXPERTS, "moe_topk": [2, 2], "head_dim": 4}),
    _causal("Lfm2Moe", {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    _causal("MiniMax", {**_EXPERTS, "num_local_experts": 4, "head_dim": 4}),
    _causal("Llama4", {**_GROUPED, "head_dim": 4, "num_local_experts": 4, "intermediate_size_mlp": 16}, "Llama4Text"),
    _causal(
        "Qwen3Next",
        {
            **_EXPERTS,
            "head_dim": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "shared_expert_intermediate_size": 8,
        },
    ),
    _causal("Qwen3_5Moe", {**_EXPERTS, "head_dim": 4}, "Qwen3_5MoeText"),
    _causal("Lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    _causal("Exaone4", _GROUPED),
    _causal("Persimmon", _GROUPED),
    _causal("BioGpt", _BERT),
    _causal("Jamba", {**_EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    _causal("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48, "state_size": 4}),
    _causal("Mamba2", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48, "head_dim": 8, "num_heads": 4}),
    _masked("Bert", _BERT, common=True),
    _masked("Roberta", _BERT),
    _masked("XLMRoberta", _BERT),
    _masked("DistilBert", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 48}),
    _masked("Albert", {**_BERT, "embedding_size": 8}),
    _masked("Electra", {**_BERT, "embedding_size": 8}),
    _masked("MPNet", _BERT),
    _masked("DebertaV2", {**_BERT, "relative_attention": True, "position_buckets": 4}),
    _masked("NomicBert", _BERT, common=True),
    _masked("MobileBert", {**_BERT, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}),
    _masked("RoFormer", {**_BERT, "embedding_size": 16}),
    _masked("ModernBert", {**_BERT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}),
    _sequence("Bert", _BERT),
    _sequence("Roberta", _BERT),
    _sequence("Deberta", {**_BERT, "relative_attention": True}),
    _sequence("Llama", {**_GROUPED, "pad_token_id": 0}),
    _sequence("Qwen3", {**_GROUPED, "head_dim": 4, "pad_token_id": 0}),
    _sequence("Bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 48}),
    _image("ViT", _IMAGE, common=True),
    _image("DeiT", _IMAGE),
    _image("Beit", _IMAGE),
    _image("Dinov2", _IMAGE),
    _image("Dinov2WithRegisters", _IMAGE),
    _image("Swin", {**_STAGES, "window_size": 2}, common=True),
    _image("Swinv2", {**_STAGES, "window_size": 2}),
    _image("ConvNext", {"num_channels": 3, "depths": [1, 1], "hidden_sizes": [4, 8], "num_stages": 2}),
    _image("ConvNextV2", {"num_channels": 3, "depths": [1, 1], "hidden_sizes": [4, 8], "num_stages": 2}),
    _image("ResNet", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}),
    _image("RegNet", {"embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4}),
    _image("Segformer", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1]}),
    _image("PvtV2", {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}),
    _image("MobileNetV2", {"depth_multiplier": 0.1}),
    _image("MobileViT", {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8], "image_size": 32}),
    _image("PoolFormer", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    Architecture("image", "DINOv3ViTConfig", "DINOv3ViTModel", _IMAGE),
    Architecture(
        "objects", "YolosConfig", "YolosForObjectDetection", {**_IMAGE, "image_size": [8, 8], "num_detection_tokens": 4}
    ),
    _pair("CLIP", _PAIR, common=True),
    _pair("AltCLIP", _PAIR),
    _pair("CLIPSeg", {**_PAIR, "extract_layers": [0, 1], "reduce_dim": 8}, "CLIPSegForImageSegmentation"),
    _answer("Qwen2VL", {"text_config": _GROUPED, "vision_config": _PATCHES}),
    _answer("Qwen2_5_VL", {"text_config": _GROUPED, "vision_config": _PATCHES}),
    _answer("Qwen3VL", {"text_config": {**_GROUPED, "head_dim": 4}, "vision_config": _DEEP_PATCHES}),
    _answer("Qwen3VLMoe", {"text_config": {**_EXPERTS, "head_dim": 4}, "vision_config": _DEEP_PATCHES}),
    _answer(
        "Ernie4_5_VLMoe",
        {
            "text_config": {
                **_BERT,
                **{"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
                **{"moe_intermediate_size": [16, 8], "moe_num_experts": 4, "mlp_layer_types": ["dense", "sparse"]},
            },
            "vision_config": _PATCHES,
        },
    ),
    _answer(
        "MistralLarge4",
        {
            "text_config": _SHARED,
            "vision_config": {**_IMAGE, "head_dim": 4},
        },
    ),
    _answer("Kimi_K25", {"text_config": _SHARED, "vision_config": _IMAGE}),
    _answer(
        "Inkling",
        {
            "text_config": _SHARED,
            "vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 4},
            "audio_config": {"hidden_size": 16},
        },
    ),
    _answer("Gemma3", {"text_config": {**_GROUPED, "head_dim": 4}, "vision_config": _IMAGE}),
    _answer(
        "PaliGemma",
        {
            "text_config": {**_GROUPED, "head_dim": 4, "model_type": "gemma"},
            "vision_config": {**_IMAGE, "model_type": "siglip_vision_model"},
        },
    ),
    _answer(
        "Idefics3",
        {
            "text_config": {**_GROUPED, "model_type": "llama", "pad_token_id": 0},
            "vision_config": _IMAGE,
            "scale_factor": 2,
        },
    ),
    _pair("Siglip", _PAIR),
    _pair("Siglip2", {"text_config": _BERT, "vision_config": {**_IMAGE, "num_patches": 4}}),
    _pair("ChineseCLIP", _PAIR),
    _pair("Blip", _PAIR, "BlipForImageTextRetrieval"),
    _pair(
        "Llava",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model"},
        },
        "LlavaForConditionalGeneration",
    ),
    Architecture(
        "text to text",
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4, "vocab_size": 48},
    ),
    Architecture(
        "text to text",
        "BartConfig",
        "BartForConditionalGeneration",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 48},
    ),
]
