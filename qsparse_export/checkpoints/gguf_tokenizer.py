"""The tokenizer that a GGUF file describes in its metadata, rebuilt as tokenizer.json and tokenizer_config.json.

Two kinds exist for Llama and Qwen2: ``gpt2`` (byte-level BPE; ``tokenizer.ggml.pre`` names the expression that splits
the text, which the file itself does not carry) and ``llama`` (SentencePiece BPE with byte fallback, merges implied by
scores). Sources: llama.cpp ``src/llama-vocab.cpp`` for the expressions, transformers ``integrations/gguf`` for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from qsparse_export.checkpoints.gguf_header import GgufHeader
from qsparse_export.errors import CheckpointError, near_names
from qsparse_export.tokenizer import TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """How text is cut before the merges: ``pattern`` (None: GPT-2's own), single digits first, whole words kept."""

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2 = _Split()
_SMOLLM = _Split(single_digits=True)
_LLAMA_BPE = _Split(_LLAMA3, whole_words=True, add_bos=True)
_SPLITS: Mapping[str, _Split] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "llama-bpe": _LLAMA_BPE,
    "smaug-bpe": _Split(_LLAMA3),
    "dbrx": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2),
    "deepseek-r1-qwen": _Split(_QWEN2),
    "megrez": _Split(_QWEN2),
    "tekken": _Split(_TEKKEN, whole_words=True, add_bos=True),
}


def gguf_tokenizer(header: GgufHeader) -> TokenizerFiles | None:
    """The two files, or None when the GGUF carries no tokenizer; CheckpointError when it is malformed or unknown."""
    model = header.metadata.get("tokenizer.ggml.model")
    if model is None or model == "no_vocab":
        return None
    vocabulary = _read(header)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(
            f"{header.path}: the tokenizer {model!r} is not supported; {near_names(str(model), builders)}: name the "
            "transformers folder of the model, which has its tokenizer.json"
        )
    try:
        tokenizer = builders[model](vocabulary)
        _add_special(tokenizer, vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(f"{header.path}: no tokenizer can be built from the metadata: {error}") from error
    config = _config(header, vocabulary)
    return TokenizerFiles(
        {
            "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        }
    )


@dataclass(frozen=True)
class _Vocabulary:
    """The metadata under ``tokenizer.ggml``, checked; special ids by name (bos, eos, unk, pad)."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    split: str
    special: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool
    add_space: bool


def _read(header: GgufHeader) -> _Vocabulary:
    data, prefix = header.metadata, "tokenizer.ggml."

    def fail(key: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{header.path}: the metadata {prefix}{key} is not {expected}; the file is damaged")

    tokens = data.get(prefix + "tokens")
    if not isinstance(tokens, list) or not tokens:
        fail("tokens", "a list of texts")
    kinds, scores, merges = (data.get(prefix + key) for key in ("token_type", "scores", "merges"))
    for key, values in (("token_type", kinds), ("scores", scores)):
        if values is not None and (not isinstance(values, np.ndarray) or len(values) != len(tokens)):
            fail(key, f"one number for each of {len(tokens)} tokens")
    if merges is not None and not (isinstance(merges, list) and all(merge.count(" ") == 1 for merge in merges)):
        fail("merges", "a list of pairs")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = data.get(f"{prefix}{key}_token_id")
        if token is None:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
            fail(f"{key}_token_id", f"the id of one of {len(tokens)} tokens")
        special[name] = token
    flags = [data.get(prefix + key) for key in ("add_bos_token", "add_eos_token", "add_space_prefix")]
    if not all(flag is None or isinstance(flag, bool) for flag in flags):
        fail("add_bos_token, add_eos_token or add_space_prefix", "true or false")
    return _Vocabulary(
        tokens=tokens,
        kinds=[1] * len(tokens) if kinds is None else kinds.tolist(),
        scores=None if scores is None else scores.tolist(),
        merges=merges,
        split=str(data.get(prefix + "pre", "default")),
        special=special,
        add_bos=flags[0],
        add_eos=bool(flags[1]),
        add_space=flags[2] is not False,
    )


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = _SPLITS.get(vocabulary.split)
    if split is None:
        raise CheckpointError(
            f"the GGUF's pre-tokenizer {vocabulary.split!r} is not known; {near_names(vocabulary.split, _SPLITS)}: another "
            "one would give the model wrong tokens; name the transformers folder, which has its tokenizer.json"
        )
    if vocabulary.merges is None:
        raise CheckpointError("the GGUF's byte-level tokenizer has no tokenizer.ggml.merges: convert the model again")
    spelling = _byte_spelling()
    alphabet = set(spelling)
    vocab = {}
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        # Converters write some added tokens as plain text; merges only know the byte alphabet.
        plain = kind in (_CONTROL, _USER_DEFINED) or alphabet.issuperset(token)
        vocab[token if plain else "".join(spelling[byte] for byte in token.encode())] = index
    merges = [(left, right) for left, right in (merge.split(" ") for merge in vocabulary.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    # Equal to the Digits step of the models' own tokenizer.json, which onnxruntime-genai 0.18 passes over in silence.
    steps: list[Any] = [pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")] if split.single_digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_template(tokenizer, vocabulary, split.add_bos if vocabulary.add_bos is None else vocabulary.add_bos)
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    if vocabulary.merges is not None:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in vocabulary.merges)]
    elif vocabulary.scores is not None:
        merges = _merges_of_scores(vocab, dict(zip(vocabulary.tokens, vocabulary.scores, strict=True)))
    else:
        raise CheckpointError(
            "the GGUF's SentencePiece tokenizer has neither scores nor merges: convert the model again"
        )
    unknown = vocabulary.special.get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    scheme = "first" if vocabulary.add_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    # llama.cpp adds BOS to a SentencePiece vocabulary that does not say otherwise.
    _add_template(tokenizer, vocabulary, vocabulary.add_bos is not False)
    return tokenizer


def _merges_of_scores(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score of the result first, as transformers orders them."""
    found = []
    for token, score in scores.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(left, right, score) for left, right in pairs]
    found.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in found]


def _add_template(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> None:
    from tokenizers import processors

    bos, eos = vocabulary.special.get("bos"), vocabulary.special.get("eos")
    before = [(vocabulary.tokens[bos], bos)] if add_bos and bos is not None else []
    after = [(vocabulary.tokens[eos], eos)] if vocabulary.add_eos and eos is not None else []
    if before or after:
        pair = [f"{name}:1" for name, _ in before] + ["$B:1"] + [f"{name}:1" for name, _ in after]
        single = [name for name, _ in before] + ["$A"] + [name for name, _ in after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=single + pair, special_tokens=[*dict.fromkeys((*before, *after))]
        )


def _add_special(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens stay whole and are special, user-defined ones stay whole; neither gets a new id."""
    from tokenizers import AddedToken

    added = [
        (token, kind)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in added if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in added if kind == _USER_DEFINED]
    )


def _config(header: GgufHeader, vocabulary: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    length = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    for name, token in vocabulary.special.items():
        config[f"{name}_token"] = vocabulary.tokens[token]
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _byte_spelling() -> list[str]:
    """GPT-2's printable character for each byte: itself when printable in Latin-1, else U+0100 onwards in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
