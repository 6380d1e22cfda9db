"""The generation loop and the perplexity, on a decoder that is a formula: the next token is twice the last one plus one."""

import numpy as np
import pytest

from qsparse_export.errors import BundleError, UsageError
from qsparse_export.generate import DecoderShape, Generator, greedy, negative_log_likelihood

VOCABULARY = 50
SHAPE = DecoderShape(
    vocab_size=VOCABULARY, kv_heads=1, head_dim=2, max_positions=20, eos_token_ids=(7,), dtype="float32"
)


class FormulaSession:
    """Keeps the ids seen so far in its KV cache, and checks that mask and positions agree with it."""

    input_names = (
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    )
    output_names = ("logits", "present.0.key", "present.0.value")
    shares_cache = False

    def __init__(self):
        self.runs = 0

    def run(self, feeds):
        self.runs += 1
        ids, past = feeds["input_ids"], feeds["past_key_values.0.key"]
        length = past.shape[2] + ids.shape[1]
        assert feeds["attention_mask"].shape == (1, length)
        assert feeds["position_ids"].tolist() == [list(range(past.shape[2], length))]
        logits = np.zeros((1, ids.shape[1], VOCABULARY), np.float32)
        np.put_along_axis(logits, (ids * 2 + 1)[..., None] % VOCABULARY, 9.0, axis=-1)
        cache = np.concatenate([past, np.repeat(ids[:, None, :, None], 2, axis=-1).astype(np.float32)], axis=2)
        return {"logits": logits, "present.0.key": cache, "present.0.value": cache}

    def to_numpy(self, tensor):
        return tensor

    def native_calls(self):
        return {"TernaryMatMul": {"generic": self.runs}}


def test_greedy_tokens_follow_the_model_with_one_run_per_token():
    session = FormulaSession()
    seen = []
    result = Generator(session, SHAPE).generate([4, 10], 4, on_token=seen.append)
    assert result.tokens == (21, 43, 37, 25) == tuple(seen)
    assert result.prompt_tokens == (4, 10)
    assert session.runs == 4  # the prompt, then three tokens: the fourth token needs no run of its own
    assert result.native_calls == {"TernaryMatMul": {"generic": 4}}
    assert result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0


def test_generation_stops_after_an_end_token_unless_told_otherwise():
    session = FormulaSession()
    assert Generator(session, SHAPE).generate([1], 5).tokens == (3, 7)
    assert session.runs == 2
    assert Generator(FormulaSession(), SHAPE).generate([1], 5, stop_at_eos=False).tokens == (3, 7, 15, 31, 13)


def test_no_new_tokens_is_legal():
    result = Generator(FormulaSession(), SHAPE).generate([1], 0)
    assert result.tokens == () and result.decode_tokens_per_s == 0.0


@pytest.mark.parametrize("ids", [[], [50], [-1], [[1]]])
def test_wrong_prompts_are_refused(ids):
    with pytest.raises(UsageError):
        Generator(FormulaSession(), SHAPE).generate(ids, 1)


def test_too_long_sequences_are_refused():
    with pytest.raises(UsageError, match="20 positions"):
        Generator(FormulaSession(), SHAPE).generate([1, 2], 19)


def test_perplexity_is_exp_of_the_mean_over_windows():
    ids = [1, 3, 8, 2, 5, 11, 4]
    generator = Generator(FormulaSession(), SHAPE)
    right, wrong = -np.log(np.exp(9) / (np.exp(9) + 49)), -np.log(1 / (np.exp(9) + 49))
    # windows [1 3 8] [2 5 11] [4]: the pairs 1-3, 2-5 and 5-11 follow the formula, 3-8 does not; a lone 4 predicts nothing
    result = generator.perplexity(ids, window=3)
    assert result.tokens == 4
    assert result.perplexity == pytest.approx(np.exp((3 * right + wrong) / 4), rel=1e-9)


def test_likelihood_survives_large_logits():
    logits = np.array([[3e4, 0.0], [0.0, 0.0]], np.float32)
    assert negative_log_likelihood(logits, np.array([0, 0])) == pytest.approx(0.0, abs=1e-12)


def test_greedy_takes_the_lowest_of_equals_and_refuses_nan():
    assert greedy(np.array([1.0, 2.0, 2.0])) == 1
    with pytest.raises(BundleError, match="NaN"):
        greedy(np.array([1.0, np.nan]))


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(BundleError, match="no tokenizer"):
        Generator(FormulaSession(), SHAPE).encode("x")
