"""onnxruntime-genai opens a bundle as it is and generates what our own loop generates, with the bundle's own kernels."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder
from qsparse_export.runtimes.ort.library import LIBRARY_NAME, open_library

og = pytest.importorskip("onnxruntime_genai", reason="from the extra [genai]")

PROMPT = "The quick brown machine could only dream."
NEW_TOKENS = 20
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=320,  # some more than the tokenizer has, as in many published models
    hidden_size=48,
    intermediate_size=130,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=128,
    bos_token_id=0,
    eos_token_ids=(1,),
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.5))),
)
BITNET = dataclasses.replace(
    LLAMA,
    architecture="bitnet",
    quantization="bitnet",
    activation="relu2",
    sub_norms=True,
    tied_embeddings=True,
    sparsity=(),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, add_tokenizer):
    """Name to a transformers folder with random weights and a tokenizer."""
    made = {}
    for name, config in {"llama": LLAMA, "bitnet": BITNET}.items():
        torch.manual_seed(5)
        made[name] = folder = tmp_path_factory.mktemp("checkpoints") / name
        folder.mkdir()
        tensors = {n: (t * 6 if t.dim() == 2 else t).contiguous() for n, t in Decoder(config).state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        plain = {
            "model_type": name,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_positions,
            "hidden_act": config.activation,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tied_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_ids[0],
        }
        if config.quantization == "bitnet":
            online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
            plain["quantization_config"] = {"quant_method": "bitnet"} | online
        (folder / "config.json").write_text(json.dumps(plain))
        assert add_tokenizer(folder) < config.vocab_size
    return made


def generated_by_genai(bundle, ids):
    """The new token ids, and the model, of onnxruntime-genai for the folder as it is."""
    model = og.Model(str(bundle))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NEW_TOKENS)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :], model


LAYER = {"CachedAttention": 1, "AddRmsNorm": 2}
CASES = {
    "llama": (
        ["--sparse-ratio", "0.4", "--sparse-ratio", "down=0.5"],
        {"SparseMatMul": 4, "GatedActivation": 1} | LAYER,
    ),
    "last-logits": (
        ["--logits", "last", "--sparse-ratio", "0.4", "--sparse-ratio", "down=0.5"],
        {"SparseMatMul": 4, "GatedActivation": 1} | LAYER,
    ),
    # q k v, gate up; o, down
    "bitnet": ([], {"SparseTernaryMatMul": 2, "TernaryMatMul": 2, "GatedActivation": 1} | LAYER),
    "portable": (["--portable"], {}),
    # ONNX Runtime's own n-bit product, with activations in float32 as genai_config.json asks.
    "portable-int4": (["--portable", "--sparse-ratio", "0.2", "--weights", "int4"], {}),
}
FOLDERS = {"last-logits": "llama", "portable": "bitnet", "portable-int4": "llama"}


@pytest.mark.parametrize("name", CASES)
def test_genai_generates_our_tokens_with_the_bundles_kernels(tmp_path, export, folders, name):
    options, calls_per_layer = CASES[name]
    export(folders[FOLDERS.get(name, name)], *options, "-o", tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    ours = bundle.open(threads=1)
    ids = ours.encode(PROMPT)
    expected = ours.generate(ids, NEW_TOKENS)
    library = bundle.path / LIBRARY_NAME
    assert library.exists() == (not name.startswith("portable"))
    search = json.loads((bundle.path / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] == (not name.startswith("portable"))
    # The same file as genai loads, so the same counters; our own session counted in the installed library's.
    before = open_library(library).calls() if library.exists() else {}
    assert before == {}
    tokens, model = generated_by_genai(bundle.path, ids)
    assert tokens == list(expected.tokens) and len(set(tokens)) > 3
    tokenizer = og.Tokenizer(model)
    assert list(tokenizer.encode(PROMPT)) == ids
    assert tokenizer.decode(ids) == ours.decode(ids) == PROMPT
    if library.exists():
        calls = {op: sum(variants.values()) for op, variants in open_library(library).calls().items()}
        assert calls == {op: count * LLAMA.layers * NEW_TOKENS for op, count in calls_per_layer.items()}
    else:
        assert expected.native_calls == {}


def test_genai_goes_on_without_an_end_of_text_token_and_reads_a_bare_tokenizer(tmp_path, export, folders):
    """The id 0, which takes the place of the second token generated, is text; tokenizer.json may come alone."""
    folder = tmp_path / "bare"
    shutil.copytree(folders["llama"], folder)
    (folder / "tokenizer_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    module = Decoder(dataclasses.replace(LLAMA, sparsity=())).eval()
    module.load_state_dict(tensors)
    ids = [5, 9, 30]
    for _ in range(2):
        ids.append(int(module(torch.tensor([ids]))[0][0, -1].argmax()))
    swapped = torch.arange(LLAMA.vocab_size)
    swapped[0], swapped[ids[-1]] = ids[-1], 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][swapped].contiguous()
    save_file(tensors, folder / "model.safetensors")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"eos_token_id": None}))
    export(folder, "-o", tmp_path / "bundle", "--verify", "quick")
    ours = Bundle.load(tmp_path / "bundle").open(threads=1)
    expected = list(ours.generate(ids[:3], NEW_TOKENS).tokens)
    tokens, model = generated_by_genai(tmp_path / "bundle", ids[:3])
    assert tokens == expected and expected[1] == 0 and len(expected) == NEW_TOKENS
    assert list(og.Tokenizer(model).encode(PROMPT)) == ours.encode(PROMPT)


def test_genai_stops_where_we_stop(tmp_path, export, folders):
    """At the second of two end-of-text tokens, here the third token that is generated; genai leaves it out of the sequence."""
    model = qs.load(folders["llama"])
    module = Decoder(LLAMA).eval()
    module.load_state_dict({name: model.weights.read(name) for name in model.weights.shapes})
    ids = [5, 9, 30]
    for _ in range(3):
        ids.append(int(module(torch.tensor([ids]))[0][0, -1].argmax()))
    config = dataclasses.replace(LLAMA, eos_token_ids=(2, ids[-1]))
    qs.save(module, config, tmp_path / "stops.pt")
    export(tmp_path / "stops.pt", "-o", tmp_path / "bundle", "--verify", "quick")
    ours = Bundle.load(tmp_path / "bundle").open(threads=1).generate(ids[:3], NEW_TOKENS)
    tokens, _ = generated_by_genai(tmp_path / "bundle", ids[:3])
    assert (list(ours.tokens), tokens) == (ids[3:], ids[3:-1])
