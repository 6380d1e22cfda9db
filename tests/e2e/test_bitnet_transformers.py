"""Folders that transformers wrote, through the command line, against transformers: BitNet's storages, official Q-Sparse."""

import json

import pytest
import torch

from qsparse_export.bundle import Bundle

transformers = pytest.importorskip("transformers", reason="the oracle of these tests, from the extra [hf]")
from bitnet_folders import masters, write  # noqa: E402
from transformers.quantizers import quantizer_bitnet  # noqa: E402

PROMPT = [1, 40, 7, 22, 61, 13, 5, 33, 18]
NEW_TOKENS = 24
CASES = {
    # storage, whether transformers loads the folder and writes it again before we read it
    "packed-multiply": ("multiply", False),
    "unpacked-multiply": ("multiply", True),
    "packed-divide": ("divide", True),
    "online-masters": ("online", True),
}


@pytest.fixture(autouse=True, scope="module")
def eager():
    """transformers compiles its BitNet functions; here they run as written."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def load_by_transformers(folder, monkeypatch):
    """transformers' own loader, in float32. It asks for accelerate, which it uses only to place weights on several devices."""
    monkeypatch.setattr(quantizer_bitnet, "is_accelerate_available", lambda *_: True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Norms and embedding stay bfloat16 beside ternary weights (5.23), and its own float() refuses quantised models.
    return torch.nn.Module.float(model)


def greedy_by_transformers(model, prompt):
    model.generation_config.eos_token_id = None  # to the full length
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return ids[0, len(prompt) :].tolist()


def require_same(bundle, process, oracle, limit):
    """Logits within ``limit`` (relative L2), the same argmax everywhere, the same greedy tokens by every way to run."""
    expected = oracle(torch.tensor([PROMPT])).logits[0].float()
    tokens = greedy_by_transformers(oracle, PROMPT)
    for native in (True, False):
        generator = Bundle.load(bundle).open(threads=1, native=native)
        logits = torch.from_numpy(generator.logits(PROMPT))
        assert (logits - expected).norm() < limit * expected.norm()
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        result = generator.generate(PROMPT, NEW_TOKENS, stop_at_eos=False)
        assert list(result.tokens) == tokens
        assert bool(result.native_calls) == native
    prompt = ",".join(map(str, PROMPT))
    printed = process("run", bundle, "--ids", prompt, "-n", NEW_TOKENS, "--ignore-eos")
    assert (printed["tokens"], printed["prompt_tokens"]) == (tokens, PROMPT)
    return printed["native_calls"]


@pytest.mark.parametrize("name", CASES)
def test_bitnet_gives_the_logits_and_tokens_of_transformers(tmp_path, export, process, monkeypatch, name):
    storage, again = CASES[name]
    folder = tmp_path / "published"
    written = write(folder, masters(), storage, dtype=torch.bfloat16)
    oracle = load_by_transformers(folder, monkeypatch)
    ids = torch.tensor([PROMPT])
    assert torch.equal(oracle(ids).logits, written(ids).logits)  # our helper wrote what transformers reads
    if again:
        folder = tmp_path / "saved-by-transformers"
        oracle.save_pretrained(folder, save_original_format=False)
    manifest = export(folder, "-o", tmp_path / "bundle")
    assert manifest["source"]["format"] == "transformers"
    assert [path["greedy_agreement"] for path in manifest["parity"]["paths"]] == [1.0, 1.0]
    calls = require_same(tmp_path / "bundle", process, oracle, limit=1e-3)
    for op in ("SparseTernaryMatMul", "TernaryMatMul"):  # q k v and gate up; o and down
        assert sum(calls[op].values()) == 2 * 2 * NEW_TOKENS


def official_masks(model, ratio):
    """The official Q-Sparse code: before every linear of a block, all but the k = int((1 - ratio) * dim) largest are zero."""

    def mask(_module, inputs):
        x = inputs[0]
        kept = x.abs().topk(int((1 - ratio) * x.shape[-1]), dim=-1).indices
        return (x * torch.zeros_like(x).scatter(-1, kept, 1.0),)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(mask)
    return model


def test_the_official_form_gives_the_logits_and_tokens_of_transformers_with_its_masks(tmp_path, export, process):
    ratio = 0.9  # (1 - 0.9) * 130 is 12.999999999999998: the official code keeps 12 channels of 130
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 130, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.Qwen2Config(**sizes, **heads, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    oracle = transformers.Qwen2ForCausalLM(config).eval()
    for tensor in oracle.parameters():  # zero biases and unit norms would hide mistakes
        tensor.data = torch.randn_like(tensor) * 0.15 + (1.0 if tensor.dim() == 1 else 0.0)
    folder = tmp_path / "qwen2"
    oracle.save_pretrained(folder)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"sparse_ratio": ratio}))
    manifest = export(folder, "-o", tmp_path / "bundle")
    assert {(row["k"], row["width"]) for row in manifest["sparsity"]} == {
        (int((1 - ratio) * width), width) for width in (48, 130)
    }
    calls = require_same(tmp_path / "bundle", process, official_masks(oracle, ratio), limit=1e-4)
    assert sum(calls["SparseMatMul"].values()) == 2 * 4 * NEW_TOKENS
