"""GGUF files: a real one against transformers and the gguf package, small ones of every type, and damaged ones."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qsparse_export as qs
from qsparse_export.checkpoints.gguf_header import read_gguf_header
from qsparse_export.checkpoints.gguf_model import READABLE_TYPES
from qsparse_export.config import RopeScaling
from qsparse_export.errors import CheckpointError, QSparseError
from qsparse_export.nn.deploy import materialize

KIND = gguf.GGMLQuantizationType
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 96, 256, 512, 2, 8, 4  # K quants need rows of 256
HF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"} | {
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved(tensor, heads):
    """What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    )


def tensors_of(architecture, tied=False):
    """GGUF name to the float32 tensor in Hugging Face's order."""
    random = np.random.default_rng(0)
    width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (width, HIDDEN),
        "attn_v": (width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    shapes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    made = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    made |= {} if tied else {"output.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        made |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        made |= {f"blk.{layer}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        if architecture == "qwen2":
            made |= {f"blk.{layer}.{name}.bias": shapes[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
    return {n: (random.standard_normal(s) * 0.1 + (len(s) == 1)).astype(np.float32) for n, s in made.items()}


def hugging_face_name(name):
    if not name.startswith("blk."):
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
            name[:-7]
        ] + ".weight"
    _, layer, module, leaf = name.split(".")
    return f"model.layers.{layer}.{HF[module]}.{leaf}"


def write(path, architecture="llama", kind=KIND.F32, tied=False, change=None, metadata=None, theta=1000.0):
    """A small GGUF; ``change`` edits the stored tensors (name -> array), ``metadata`` adds keys."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(theta)
    tokens = [chr(ord("!") + i) for i in range(VOCAB - 3)] + ["!!", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    stored = tensors_of(architecture, tied)
    if architecture == "llama":
        for name in stored:
            if "attn_q." in name or "attn_k." in name:
                stored[name] = interleaved(stored[name], HEADS if "attn_q" in name else KV_HEADS)
    if change:
        change(stored)
    for name, array in stored.items():
        if array.ndim > 1 and kind != KIND.F32:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_are_the_dequantised_ones_in_the_original_order(tmp_path, architecture, kind):
    model = qs.load(write(tmp_path / "m.gguf", architecture, KIND[kind], tied=architecture == "qwen2"))
    assert (model.config.architecture, model.config.qkv_bias, model.config.tied_embeddings) == (
        (architecture, True, True) if architecture == "qwen2" else (architecture, False, False)
    )
    for name, array in tensors_of(architecture, model.config.tied_embeddings).items():
        expected = dequantize(quantize(array, KIND[kind]), KIND[kind]) if array.ndim > 1 else array
        read = model.weights.read(hugging_face_name(name))
        assert torch.equal(read.float(), torch.from_numpy(expected))
        stored_half = {"F16": torch.float16, "BF16": torch.bfloat16}
        assert read.dtype == (stored_half.get(kind, torch.float32) if array.ndim > 1 else torch.float32)


@pytest.mark.parametrize("kind", [k for k in READABLE_TYPES if k.endswith("_K") or k.startswith("IQ")])
def test_types_that_only_llama_cpp_writes_are_dequantised_by_the_gguf_package(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
    random = np.random.default_rng(1)
    raw = random.integers(0, 256, (HIDDEN, INNER // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=KIND[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from qsparse_export.checkpoints.gguf_model import read_tensor

    header = read_gguf_header(tmp_path / "m.gguf")
    read = read_tensor(header.path, header.tensors["blk.0.ffn_down.weight"])
    with np.errstate(all="ignore"):
        expected = dequantize(raw, KIND[kind])
    assert read.shape == (HIDDEN, INNER)
    np.testing.assert_array_equal(read.numpy(), expected)


def test_rope_scaling_is_read_and_recovered(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert qs.load(write(tmp_path / "a.gguf", metadata=linear)).config.rope_scaling == RopeScaling("linear", 4.0)
    head_dim, theta = HIDDEN // HEADS, 500000.0
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    llama3 = 1 / ((1 - smooth) / 32.0 + smooth)
    for factors, understood in ((llama3, True), (np.linspace(1, 9, head_dim // 2), False)):
        extra = {"rope_freqs.weight": factors.astype(np.float32)}
        path = write(tmp_path / "b.gguf", change=lambda stored, extra=extra: stored.update(extra), theta=theta)
        if understood:
            assert qs.load(path).config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
        else:
            with pytest.raises(CheckpointError, match="rope_freqs"):
                qs.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'.*llama"),
        ({"metadata": {"llama.expert_count": 8}}, "8 experts"),
        ({"metadata": {"llama.rope.dimension_count": 16}}, "partial rotary"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn'"),
        ({"metadata": {"split.count": 3}}, "split"),
        ({"change": lambda t: t.pop("blk.1.ffn_up.weight")}, r"layers.1.mlp.up_proj.weight is missing"),
        (
            {"change": lambda t: t.update({"blk.0.extra.weight": np.zeros(3, np.float32)})},
            r"blk\.0\.extra\.weight is not part",
        ),
        (
            {"change": lambda t: t.update({"output.weight": np.zeros((7, HIDDEN), np.float32)})},
            r"lm_head.weight has the shape",
        ),
        (
            {"change": lambda t: t.update({"output.weight": np.zeros((VOCAB, HIDDEN), np.int32)})},
            r"lm_head.weight has the type I32",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        qs.load(write(tmp_path / "m.gguf", **options))


def test_nan_names_the_tensor(tmp_path):
    path = write(tmp_path / "m.gguf", change=lambda t: t["blk.0.ffn_up.weight"].__setitem__((3, 4), np.inf))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight holds 1 NaN or Inf"):
        qs.load(path).weights.read("model.layers.0.mlp.up_proj.weight")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "small.gguf", kind=KIND.Q4_0)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGML", "no known format"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "more than the file can hold"),
        (16, struct.pack("<Q", 1 << 60), "more than the file can hold"),
        (24, struct.pack("<Q", 1 << 62), "promises"),
    ],
)
def test_lying_headers(small, tmp_path, offset, value, message):
    raw = bytearray(small.read_bytes())
    raw[offset : offset + len(value)] = value
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        qs.load(tmp_path / "m.gguf")


def test_truncated_files(small, tmp_path):
    raw = small.read_bytes()
    for length in (4, 20, 100, 1000, len(raw) // 2, len(raw) - 40):
        (tmp_path / "m.gguf").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            qs.load(tmp_path / "m.gguf")


@settings(max_examples=200, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 1 << 24),
)
def test_damage_never_raises_anything_else(small, tmp_path, flips, cut):
    raw = bytearray(small.read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    (tmp_path / "m.gguf").write_bytes(raw[: max(cut, 24)])
    try:
        model = qs.load(tmp_path / "m.gguf")
        with np.errstate(all="ignore"):
            for name in model.weights.shapes:
                model.weights.read(name)
    except QSparseError as error:
        assert str(error)


@pytest.fixture(scope="module")
def stored(smollm2_gguf):
    """Tensors of the real file as the gguf package reads them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}


def test_a_real_file_has_the_gguf_packages_values(smollm2_gguf, stored):
    model = qs.load(smollm2_gguf)
    config = model.config
    assert (model.name, model.source_format) == ("SmolLM2-135M-Instruct", "gguf")
    assert (config.layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert config.tied_embeddings and config.rope_theta == 100000.0 and config.eos_token_ids == (2,)
    assert model.weights.shapes.keys() == {hugging_face_name(name) for name in stored}
    for name in ("token_embd.weight", "blk.29.ffn_down.weight", "blk.7.attn_v.weight", "blk.3.attn_norm.weight"):
        expected = dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(model.weights.read(hugging_face_name(name)).numpy(), expected)


def test_a_real_model_has_the_logits_of_transformers(smollm2_gguf, stored):
    transformers = pytest.importorskip("transformers", reason="the oracle of this test, from the extra [hf]")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    restore = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3}).process
    state = {}
    for name, tensor in stored.items():
        values = restore(dequantize(tensor.data, tensor.tensor_type), name).weights
        state[hugging_face_name(name)] = torch.from_numpy(np.array(values))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    model = qs.load(smollm2_gguf)
    for name, tensor in state.items():
        assert torch.equal(model.weights.read(name), tensor), name
    ids = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]])
    with torch.no_grad():
        ours = materialize(model.config, model.weights, torch.float32)(ids)[0]
        expected = theirs(ids).logits
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_the_chat_template_travels(smollm2_gguf):
    config = json.loads(qs.load(smollm2_gguf).tokenizer.read()["tokenizer_config.json"])
    assert "<|im_start|>" in config["chat_template"]
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == (
        "<|im_start|>",
        "<|im_end|>",
        8192,
    )
