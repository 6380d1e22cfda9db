"""Text and TOML to rules, and their meeting with the checkpoint's own."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_export.checkpoints.expected import block_linears
from qsparse_export.config import ModelConfig, SparsityRule, TopK, topk_of
from qsparse_export.errors import CheckpointError, UsageError
from qsparse_export.sparsity import parse_sparsity, rule_text, rules_of_mapping, with_sparsity

CONFIG = ModelConfig("llama", 64, 32, 40, layers=2, heads=2, kv_heads=1, head_dim=16)
LINEARS = block_linears(CONFIG)
DOWN, UP, Q = (f"model.layers.1.{name}_proj" for name in ("mlp.down", "mlp.up", "self_attn.q"))


def applied(items, config=CONFIG, override=False):
    return with_sparsity(config, parse_sparsity(items), LINEARS, override=override)


def ratio(config, name):
    return topk_of(config.sparsity, name).sparse_ratio


def test_the_last_match_wins_and_the_head_stays_dense():
    config = applied(["0.25", "down=0.5"])
    assert (ratio(config, DOWN), ratio(config, UP), ratio(config, "lm_head")) == (0.5, 0.25, 0.0)
    assert ratio(applied(["down=0.5", "0.25"]), DOWN) == 0.25


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up", "down_proj"])
def test_projection_names_reach_what_they_say(name):
    config = applied([f"{name}=0.5"])
    reached = {linear.rpartition(".")[2].removesuffix("_proj") for linear in LINEARS if ratio(config, linear)}
    expected = {"qkv": {"q", "k", "v"}, "gate_up": {"gate", "up"}, "down_proj": {"down"}}.get(name, {name})
    assert reached == expected


def test_patterns_blocks_and_rescale():
    config = applied(["model.layers.1.*=0.5:block=16:rescale=l2"])
    assert topk_of(config.sparsity, Q) == TopK(0.5, 16, "l2")
    assert topk_of(config.sparsity, "model.layers.0.self_attn.q_proj").is_dense


def test_toml_keeps_its_order(tmp_path):
    file = tmp_path / "ratios.toml"
    file.write_text('"*_proj" = 0.25\ndown = {sparse_ratio = 0.5, block = 8}\n"model.layers.0.*" = 0\n')
    config = applied([str(file)])
    assert topk_of(config.sparsity, DOWN) == TopK(0.5, 8)
    assert topk_of(config.sparsity, "model.layers.0.mlp.down_proj").is_dense


@pytest.mark.parametrize(
    "item",
    [
        "",
        "x",
        "1.5",
        "-0.1",
        "nan",
        "inf",
        "dwn=0.5",
        "down=",
        "0.5:blok=3",
        "0.5:block=x",
        "0.5:block=-1",
        "0.5:rescale=l3",
        "0.5:block",
        "nothing.*=0.5",
        "/nowhere/ratios.toml",
    ],
)
def test_bad_items_are_usage_errors(item):
    with pytest.raises(UsageError):
        applied([item])


@pytest.mark.parametrize("text", ["down = ", "down = 'x'", "down = {sparse_ratio = 0.5, k = 3}", "[a]\nb = 1", "\xff"])
def test_bad_toml_is_a_usage_error(tmp_path, text):
    file = tmp_path / "ratios.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"ratios\.toml"):
        applied([str(file)])


def test_near_names_are_offered():
    with pytest.raises(UsageError, match="did you mean down"):
        parse_sparsity(["dwon=0.5"])


def test_contradicting_a_sparse_checkpoint_needs_override():
    trained = replace(CONFIG, sparsity=(SparsityRule("*_proj", TopK(0.5)),))
    with pytest.raises(UsageError, match="--override"):
        applied(["down=0.6"], trained)
    assert ratio(applied(["down=0.6"], trained, override=True), DOWN) == 0.6
    assert ratio(applied(["down=0.6"], trained, override=True), UP) == 0.5
    with pytest.raises(UsageError, match="sparse_ratio 0 was asked"):
        applied(["0"], trained)


def test_the_same_masks_are_no_contradiction():
    trained = replace(CONFIG, sparsity=(SparsityRule("*_proj", TopK(0.5)),))
    assert ratio(applied(["0.5", "down=0.5"], trained), DOWN) == 0.5
    assert ratio(applied(["0.51", "down=0.52"], trained, override=True), DOWN) == 0.52
    dense = replace(CONFIG, sparsity=(SparsityRule("*_proj", TopK(0.0)),))
    assert ratio(applied(["0.5"], dense), DOWN) == 0.5


def test_a_mapping_in_a_checkpoint_is_judged_as_a_checkpoint():
    assert rules_of_mapping({"qkv": 0.5}, "config.json")[0] == SparsityRule("*.q_proj", TopK(0.5))
    with pytest.raises(CheckpointError, match=r"config\.json: down"):
        rules_of_mapping({"down": 1.5}, "config.json")


@given(
    pattern=st.sampled_from(["*_proj", "*.down_proj", "model.layers.0.*"]),
    ratio=st.floats(0, 1),
    block=st.integers(0, 100),
    rescale=st.sampled_from(["none", "l2"]),
)
def test_text_of_a_rule_reads_back(pattern, ratio, block, rescale):
    rule = SparsityRule(pattern, TopK(ratio, block, rescale))
    assert parse_sparsity([rule_text(rule)]) == (rule,)
