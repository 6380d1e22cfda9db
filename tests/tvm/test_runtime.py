"""The runtime tvm on tiny models: verified like any other, caches in place, any number of threads, and what it refuses."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from evidence import EXECUTED, WHOLE_MODELS, Evidence
from onnx import parser
from test_export import CONFIGS, decoder

import qsparse_export as qs
from qsparse_export.cli import bench, run
from qsparse_export.errors import BundleError, ExportError, TargetError, UsageError
from qsparse_export.runtimes import get_runtime
from qsparse_export.runtimes.tvm import build, environment
from qsparse_export.runtimes.tvm.runtime import GRAPH, MODULE, WEIGHTS, TvmRuntime
from qsparse_export.targets.target import load_target

MODELS = {"qwen2": "int4", "bitnet": "keep", "moe": "keep"}
IDS = [5, 3, 60, 11]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = qs.export(decoder(CONFIGS[name]), out=out, name=name, runtime="tvm", weights=MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_models_are_verified_and_have_one_way_to_run(bundles, name, evidence):
    manifest = bundles(name).manifest
    (path,) = manifest["parity"]["paths"]
    assert path["path"] == "native"
    assert path["relative_logit_error"] <= manifest["parity"]["limit"]
    assert path["greedy_agreement"] == 1.0
    variants = {variant for calls in path["native_calls"].values() for variant in calls}
    assert variants == {f"tvm-{manifest['library']['lanes']}"}
    assert path["native_calls"]["CachedAttention"].popitem()[1] == 32 * CONFIGS[name].layers
    assert manifest["library"]["apache-tvm"] == environment.VERSIONS["apache-tvm"]
    assert {GRAPH, WEIGHTS, MODULE} <= manifest["files"].keys()
    share = path["relative_logit_error"] / manifest["parity"]["limit"]
    evidence(Evidence(WHOLE_MODELS, "TVM", "x86-64", EXECUTED, error_share=share))


@pytest.mark.parametrize("name", ["moe", "bitnet-moe"])
def test_experts_need_no_python_where_the_pass_lowers_them(bundles, tmp_path, name):
    """A program without Python has TVM's runtime, and not the NumPy function that this registers for NonZero."""
    passes = "default,+infer-shapes@attach-bodies,+lower-experts@attach-bodies"
    lowered = qs.export(decoder(CONFIGS[name]), out=tmp_path / "bundle", runtime="tvm", pipeline=passes, verify="quick")
    (path,) = lowered.manifest["parity"]["paths"]
    assert path["relative_logit_error"] <= lowered.manifest["parity"]["limit"]
    assert path["greedy_agreement"] == 1.0
    needs_python = [b"relax.run.nonzero" in (each.path / MODULE).read_bytes() for each in (lowered, bundles("moe"))]
    assert needs_python == [False, True]


@pytest.mark.parametrize("threads", [1, 2, None])
def test_generated_tokens_are_those_of_pytorch(bundles, threads):
    module = decoder(CONFIGS["bitnet"])
    expected = list(IDS)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.tensor([expected])
            logits, _ = module(tokens, torch.ones_like(tokens), torch.arange(len(expected))[None], past=None)
            expected.append(int(logits[0, -1].argmax()))
    result = bundles("bitnet").open(threads=threads).generate(IDS, max_new_tokens=12, stop_at_eos=False)
    assert list(result.tokens) == expected[4:]


def feeds_of(session, rng, batch, tokens, past, room=0):
    """Random tokens behind a random past with room behind it; the first key of the last sequence is hidden."""
    config = CONFIGS["bitnet"]
    mask = np.ones((batch, past + tokens), np.int64)
    mask[-1, 0] = 0
    feeds = {
        "input_ids": rng.integers(0, config.vocab_size, (batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    shape = (batch, config.kv_heads, past + room, config.head_dim)
    caches = [name for name in session.input_names if name.startswith("past_key_values.")]
    return feeds | {name: rng.standard_normal(shape).astype(np.float32) for name in caches}


@pytest.mark.parametrize(("batch", "tokens", "past", "room"), [(1, 1, 0, 0), (1, 1, 9, 0), (2, 3, 5, 0), (3, 1, 7, 2)])
def test_any_lengths_agree_with_onnx_runtime(bundles, batch, tokens, past, room):
    folder = bundles("bitnet").path
    session = TvmRuntime().open(folder, threads=2, native=True)
    feeds = feeds_of(session, np.random.default_rng(tokens + past), batch, tokens, past, room)
    given = {name: array.copy() for name, array in feeds.items()}
    outputs = session.run(feeds)
    judge = get_runtime("ort").open(folder, threads=2, native=True)
    expected = judge.run(given)
    for name in session.output_names:
        np.testing.assert_allclose(
            session.to_numpy(outputs[name]), judge.to_numpy(expected[name]), rtol=1e-4, atol=1e-5, err_msg=name
        )
    for name, array in given.items():
        np.testing.assert_array_equal(feeds[name], array)  # what is fed stays as it is


def test_a_cache_with_room_is_written_in_place_and_else_copied(bundles):
    session = TvmRuntime().open(bundles("bitnet").path, threads=1, native=True)
    assert session.shares_cache
    feeds = feeds_of(session, np.random.default_rng(0), 1, 1, 4, room=2)
    pasts = [name for name in feeds if name.startswith("past_key_values.")]
    tensors = {name: session.to_tensor(feeds[name]) for name in pasts}
    results = {name.replace("past_key_values.", "present."): tensor for name, tensor in tensors.items()}
    copied = session.run(feeds | tensors)
    for name, present in zip(pasts, results, strict=True):
        np.testing.assert_array_equal(session.to_numpy(tensors[name]), feeds[name])
        assert not np.array_equal(session.to_numpy(copied[present])[:, :, 4], feeds[name][:, :, 4])
    in_place = session.run(feeds | tensors, results)
    for present, tensor in results.items():
        assert in_place[present] is tensor
        np.testing.assert_array_equal(session.to_numpy(tensor), session.to_numpy(copied[present]))
    elsewhere = {name: session.to_tensor(np.zeros_like(feeds[pasts[0]])) for name in results}
    session.run(feeds, elsewhere)
    for present, tensor in elsewhere.items():
        np.testing.assert_array_equal(session.to_numpy(tensor), session.to_numpy(copied[present]))


def test_a_cache_without_room_is_not_written_in_place(bundles):
    session = TvmRuntime().open(bundles("bitnet").path, threads=1, native=True)
    feeds = feeds_of(session, np.random.default_rng(0), 1, 2, 4)
    name = "past_key_values.0.key"
    tensor = session.to_tensor(feeds[name])
    with pytest.raises(UsageError, match=r"past_key_values.0.key has room for 4 tokens and is to hold 6"):
        session.run(feeds | {name: tensor}, {"present.0.key": tensor})


def test_inner_values_can_be_read(bundles):
    folder = bundles("bitnet").path
    model = onnx.load(folder / GRAPH, load_external_data=False)
    tap = next(node.output[0] for node in model.graph.node if node.op_type == "GatedActivation")
    session = TvmRuntime().open(folder, threads=1, native=True, taps=(tap,))
    feeds = feeds_of(session, np.random.default_rng(0), 1, 2, 3)
    judge = get_runtime("ort").open(folder, threads=1, native=True, taps=(tap,))
    expected = judge.to_numpy(judge.run(feeds)[tap])
    np.testing.assert_allclose(session.to_numpy(session.run(feeds)[tap]), expected, rtol=1e-4, atol=1e-6)


def test_run_and_bench_take_the_bundle_and_refuse_bodies(bundles, capsys):
    path = str(bundles("bitnet").path)
    assert run.main([path, "--ids", "5,3", "-n", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4
    assert bench.main([path, "-p", "4", "-n", "3", "-r", "1", "-t", "1,2", "--dense", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["mode"], row["threads"]) for row in rows} == {(m, t) for m in ("native", "dense") for t in (1, 2)}
    for main, options in ((run.main, ["--ids", "1"]), (bench.main, ["-p", "4", "-n", "3"])):
        assert main([path, *options, "--no-native"]) == 2
        assert "is of the runtime tvm" in capsys.readouterr().err


def damaged(bundle, tmp_path, content):
    """A copy of the bundle's files whose module has other content."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    (copy / MODULE).write_bytes(content)
    return copy


def test_a_damaged_module_is_refused_before_it_is_loaded(bundles, tmp_path):
    bundle = bundles("bitnet")
    content = (bundle.path / MODULE).read_bytes()
    other = content[:18] + (183).to_bytes(2, "little") + content[20:]
    cases = {
        "is no shared library": b"\x7fELF",
        "ends after": content[: len(content) // 2],
        "compiled for aarch64, and this machine is": other,
    }
    for number, (message, bad) in enumerate(cases.items()):
        folder = damaged(bundle, tmp_path / str(number), bad)
        with pytest.raises(BundleError, match=message):
            TvmRuntime().open(folder, threads=1, native=True)
    (folder / MODULE).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        TvmRuntime().open(folder, threads=1, native=True)


def test_a_module_of_another_graph_is_refused(bundles, tmp_path):
    folder = damaged(bundles("bitnet"), tmp_path, (bundles("moe").path / MODULE).read_bytes())
    session = TvmRuntime().open(folder, threads=1, native=True)
    with pytest.raises(BundleError, match="does not take what the graph gives it"):
        session.run(feeds_of(session, np.random.default_rng(0), 1, 1, 0))


def test_a_module_that_was_made_elsewhere_runs_only_if_it_is_trusted(bundles, tmp_path, monkeypatch):
    folder = damaged(bundles("bitnet"), tmp_path / "bundle", (bundles("bitnet").path / MODULE).read_bytes())
    TvmRuntime().open(folder, threads=1, native=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user's"))
    with pytest.raises(BundleError, match="QSPARSE_TRUST_MODULES=1 if you trust whoever made it"):
        TvmRuntime().open(folder, threads=1, native=True)
    monkeypatch.setenv("QSPARSE_TRUST_MODULES", "1")
    TvmRuntime().open(folder, threads=1, native=True)
    monkeypatch.setenv("QSPARSE_TRUST_MODULES", "yes")
    with pytest.raises(UsageError, match="expected 0 or 1"):
        TvmRuntime().open(folder, threads=1, native=True)


def test_short_weights_are_refused(bundles, tmp_path):
    folder = damaged(bundles("bitnet"), tmp_path, (bundles("bitnet").path / MODULE).read_bytes())
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(
        BundleError, match=r"ends at .*: the file is incomplete or belongs to another graph|cannot be read"
    ):
        TvmRuntime().open(folder, threads=1, native=True)


def test_a_module_for_arm_is_compiled_and_the_same_graph_verified_here(bundles, tmp_path):
    out = tmp_path / "pi"
    bundle = qs.export(decoder(CONFIGS["bitnet"]), target="raspberry-pi-5", runtime="tvm", out=out, verify="quick")
    assert int.from_bytes((out / MODULE).read_bytes()[18:20], "little") == 183
    assert bundle.manifest["library"]["lanes"] == "neondot"
    ran_on = bundle.manifest["parity"]["ran_on"]
    assert ran_on["covers_library"] is False and "was compiled, not run" in ran_on["note"]
    with pytest.raises(TargetError, match="made for raspberry-pi-5") as refusal:
        bundle.open()
    assert "--no-native" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"portable": True}, TargetError, "has no function bodies"),
        ({"weights": "fp16"}, TargetError, "computes in float32, not in float16"),
        ({"target": "web"}, TargetError, "not tvm"),
        ({"with_bench": True}, TargetError, "leave --with-bench out"),
        ({"pipeline": "default,-fuse-attention"}, ExportError, "TVM's importer does not take the graph"),
    ],
)
def test_what_it_cannot_do_is_refused_and_leaves_nothing(tmp_path, options, error, message):
    out = tmp_path / "bundle"
    with pytest.raises(error, match=message):
        qs.export(decoder(CONFIGS["llama"]), runtime="tvm", out=out, verify="none", **options)
    assert not list(tmp_path.iterdir())


def test_a_foreign_graph_is_compiled_and_judged_by_its_file(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[batch, 16] x) => (float[batch, 8] y)
    { w = ConstantOfShape <value = float[1] {0.25}> (shape)  a = MatMul (x, w)  b = Relu (a)  y = Softmax (b) }
    """.replace("(float[batch, 8] y)", "(float[batch, 8] y) <int64[2] shape = {16, 8}>")
    onnx.save(parser.parse_model(text), tmp_path / "g.onnx")
    bundle = qs.export(qs.load(tmp_path / "g.onnx"), runtime="tvm", out=tmp_path / "out")
    assert [path["path"] for path in bundle.manifest["parity"]["paths"]] == ["native"]


def test_a_missing_or_other_tvm_is_named(monkeypatch):
    def versions(found):
        def version(package):
            if package not in found:
                raise environment.PackageNotFoundError(package)
            return found[package]

        monkeypatch.setattr(environment, "version", version)

    versions({})
    with pytest.raises(TargetError, match=r"needs apache-tvm, which is not installed; .*qsparse-export\[tvm\]"):
        environment.require_tvm()
    versions({**environment.VERSIONS, "apache-tvm-ffi": "0.1.15.post2"})
    with pytest.raises(TargetError, match=r"apache-tvm-ffi 0.1.15.post2 crashes the process"):
        environment.require_tvm()
    versions({**environment.VERSIONS, "apache-tvm": "0.28.0"})
    with pytest.raises(TargetError, match=r"made for apache-tvm 0.27.0.post1, and 0.28.0 is installed"):
        TvmRuntime().require_target(load_target("cpu"))


def test_a_missing_linker_is_named(monkeypatch):
    monkeypatch.setattr(build.cc, "get_cc", lambda: None)
    monkeypatch.setattr(build.shutil, "which", lambda _program: None)
    with pytest.raises(TargetError, match="apt-get install g\\+\\+"):
        TvmRuntime().require_target(load_target("cpu"))
    with pytest.raises(TargetError, match=r"apt-get install g\+\+-aarch64-linux-gnu"):
        TvmRuntime().require_target(load_target("raspberry-pi-5"))


def test_more_threads_than_the_pool_has_are_refused(bundles):
    with pytest.raises(TargetError, match=r"4096 threads, and TVM's pool has"):
        bundles("bitnet").open(threads=4096)


def test_a_pool_without_a_number_is_refused(bundles, monkeypatch):
    for word in ("many", "0", "-1"):
        monkeypatch.setenv("TVM_NUM_THREADS", word)
        with pytest.raises(UsageError, match=f"TVM_NUM_THREADS is '{word}'; expected a number"):
            bundles("bitnet").open(threads=1)
