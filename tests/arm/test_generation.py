"""ARM for real, emulated: ONNX Runtime's own library loads ours, and trained models generate the tokens that they do here."""

import json
import shutil

import pytest
from emulation import Emulator
from evidence import EMULATED, WHOLE_MODELS, Evidence

from qsparse_export.generate import DecoderShape, Generator
from qsparse_export.runtimes import get_runtime
from qsparse_export.runtimes.ort.library import DEVICE_BENCH_NAME, LIBRARY_NAME

VARIANTS = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neondot"}
MODELS = ("qsparse", "bitnet")
PROMPT = (3, 5, 7, 9)
TOKENS = 16


def here(bundle, native):
    """The tokens on this machine and the calls of each op, with its own build of the kernels or on the function bodies."""
    session = get_runtime("ort").open(bundle.path, threads=1, native=native)
    model = bundle.manifest["model"]
    limits = (model["max_positions"], tuple(model["eos_token_ids"]))
    shape = DecoderShape(model["vocab_size"], model["kv_heads"], model["head_dim"], *limits, bundle.manifest["dtype"])
    result = Generator(session, shape).generate(PROMPT, TOKENS, stop_at_eos=False)
    return list(result.tokens), {op: sum(variants.values()) for op, variants in result.native_calls.items()}


@pytest.mark.parametrize("cpu", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_and_calls_as_on_this_machine(bundle, emulator, onnxruntime, name, cpu, evidence):
    made, processor = bundle(name), emulator(cpu)
    expected, calls = here(made, native=True)
    assert len(set(expected)) > TOKENS // 2  # a model that repeats one token proves little
    assert calls
    for mode in ("native", "bodies"):
        words = ("--ids", ",".join(map(str, PROMPT)), "-n", TOKENS, "-t", 1, "--modes", mode)
        result = processor.run(made.path / DEVICE_BENCH_NAME, *words, "--onnxruntime", onnxruntime, made.path)
        assert result.exit_code == 0, result.said
        assert result.printed["tokens"] == expected
        there = {op: {VARIANTS[cpu]: count} for op, count in calls.items()} if mode == "native" else {}
        assert result.printed["native_calls"] == there
        backend = "ONNX Runtime, C++ kernels" if mode == "native" else "ONNX Runtime, function bodies"
        evidence(Evidence(WHOLE_MODELS, backend, f"aarch64 {VARIANTS[cpu]}", EMULATED, f"qemu {cpu}"))
    assert here(made, native=False) == (expected, {})


def test_every_variant_generates_the_same_tokens(bundle, emulator, onnxruntime):
    made, processor = bundle("bitnet"), emulator("cortex-a76")
    words = ("--ids", "3,5,7", "-n", 8, "-t", 1, "--modes", "native", "--onnxruntime", onnxruntime, made.path)
    tokens = set()
    for variant in ("generic", "neon", "neondot"):
        result = processor.run(made.path / DEVICE_BENCH_NAME, *words, variant=variant)
        assert list(result.printed["native_calls"]["SparseTernaryMatMul"]) == [variant]
        tokens.add(tuple(result.printed["tokens"]))
    assert len(tokens) == 1


def test_a_variant_that_the_processor_lacks_is_refused(bundle, emulator, onnxruntime):
    made = bundle("bitnet")
    words = ("--ids", "3", "-n", 1, "--modes", "native", "--onnxruntime", onnxruntime, made.path)
    result = emulator("cortex-a53").run(made.path / DEVICE_BENCH_NAME, *words, variant="neondot")
    assert result.exit_code == 1
    assert "QSPARSE_VARIANT=neondot cannot run on this machine; supported here: generic neon" in result.said


@pytest.mark.parametrize("cpu", VARIANTS)
def test_the_bench_checks_the_recorded_tokens_and_reports(bundle, emulator, onnxruntime, cpu):
    made = bundle("bitnet")
    modes = ("native", "bodies", "dense")
    words = ("-p", 16, "-n", 4, "-r", 2, "-t", 1, "--modes", ",".join(modes), "--onnxruntime", onnxruntime, made.path)
    result = emulator(cpu).run(made.path / DEVICE_BENCH_NAME, *words)
    assert result.exit_code == 0, result.said
    report = result.printed
    assert [(row["test"], row["mode"], row["threads"]) for row in report["rows"]] == [
        (test, mode, 1) for test in ("pp16", "tg4") for mode in modes
    ]
    for row in report["rows"]:
        assert row["tokens_per_s_mean"] > 0 and row["p90_ms"] >= row["p50_ms"] > 0
    checked = report["checked_tokens"]
    assert {mode: checked[mode] for mode in modes[:2]} == {
        mode: {"steady": 32, "agree": 32, "of": 32} for mode in modes[:2]
    }
    assert checked["dense"]["of"] == 32
    assert {variant for calls in report["variants"].values() for variant in calls} == {VARIANTS[cpu]}
    assert report["machine"]["arch"] == "aarch64"
    assert ("asimddp" in report["machine"]["features"]) == (cpu == "cortex-a76")
    assert report["peak_rss_bytes"] > made.manifest["files"]["model.onnx.data"]["bytes"]
    # Of what is active, and of what a token reads, the export knows.
    native, bodies, dense = report["activities"]
    recorded = made.manifest["bench"]
    assert native["mean_density"] == pytest.approx(recorded["sparse"]["mean_density"])
    assert (
        native["bytes_per_token"] == report["bytes_per_token"] == pytest.approx(recorded["sparse"]["bytes_per_token"])
    )
    assert bodies["bytes_per_token"] is None
    assert dense["bytes_per_token"] == pytest.approx(recorded["dense"]["bytes_per_token"])
    assert report["model"]["target"] == "arm64"


def test_frequency_temperature_and_energy_where_the_system_tells(bundle, onnxruntime, tmp_path):
    """The emulator shows its programs the files under its root in place of the machine's own."""
    processor = Emulator.of("cortex-a76", tmp_path)
    files = {
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000",
        "class/thermal/thermal_zone0/temp": "61500",
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/powercap/intel-rapl:0/energy_uj": "1000000",
        "class/powercap/intel-rapl:0/name": "package-0",
        "class/hwmon/hwmon3/name": "ina2xx",
        "class/hwmon/hwmon3/energy1_input": "5000000",
    }
    for name, content in files.items():
        file = tmp_path / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    made = bundle("bitnet")
    words = ("-p", 4, "-n", 2, "-r", 1, "-t", 1, "--modes", "native", "--onnxruntime", onnxruntime, made.path)
    result = processor.run(made.path / DEVICE_BENCH_NAME, *words)
    assert result.exit_code == 0, result.said
    state = {"frequency_mhz": [2400], "temperature_celsius": {"thermal_zone0 cpu-thermal": 61.5}}
    assert result.printed["state_before"] == result.printed["state_after"] == state
    counted = {"intel-rapl:0 package-0": 0, "ina2xx energy1": 0}  # counters that stand still
    assert result.printed["energy"] == [
        {"test": test, "mode": "native", "threads": 1, "joules_per_token": counted} for test in ("pp4", "tg2")
    ]


def test_other_tokens_than_recorded_are_noticed_before_anything_is_timed(bundle, emulator, onnxruntime, tmp_path):
    copy = tmp_path / "altered"
    shutil.copytree(bundle("bitnet").path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["parity"]["paths"][1]["greedy_ids"][5] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    words = ("-p", 0, "-n", 1, "-r", 1, "-t", 1, "--onnxruntime", onnxruntime, copy)
    result = emulator("cortex-a76").run(copy / DEVICE_BENCH_NAME, *words)
    assert result.exit_code == 1
    assert result.printed == ""
    assert "the bodies path generates other tokens than at export" in result.said
    assert (
        "check bodies" in result.said and "tg1" not in result.said
    )  # nothing was timed, not even the path that was right


def test_a_library_for_another_machine_is_refused(bundle, emulator, onnxruntime, tmp_path):
    from qsparse_export.runtimes.ort.library import library_path

    copy = tmp_path / "wrong"
    shutil.copytree(bundle("bitnet").path, copy)
    shutil.copyfile(library_path(), copy / LIBRARY_NAME)
    words = ("--ids", 1, "-n", 1, "--onnxruntime", onnxruntime, copy)
    result = emulator("cortex-a76").run(copy / DEVICE_BENCH_NAME, *words)
    assert result.exit_code == 1
    assert "the kernel library cannot be loaded" in result.said
