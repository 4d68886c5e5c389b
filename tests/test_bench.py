"""What bench/ measures and says of it: peers.py, decode.py and memory.py, all at toy size."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import one_thread  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import decode, memory, peers

ROOT = Path(train.__file__).resolve().parent
needs_transformers = pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers is for Python >= 3.11")
TOY = peers.SIZES["toy"]


def bench(script: str, *argv) -> subprocess.CompletedProcess:
    """A script of bench/ in a process of its own, with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, ROOT / "bench" / script, *map(str, argv)], capture_output=True, text=True,
                          env=env, timeout=300)  # fmt: skip


# == the models ========================================================================================================


@needs_transformers
@pytest.mark.parametrize("size", peers.SIZES)
def test_all_models_have_as_many_parameters_as_gpt2(size):
    size = peers.SIZES[size]
    with torch.device("meta"):
        models = {name: peers.build(name, size, 64) for name in peers.MODELS}
    counts = {name: peers.count(model) for name, model in models.items()}
    assert counts["granite-64"] == counts["granite-256"] == counts["hybrid"], "the same architecture"
    assert all(abs(n / counts["gpt2"] - 1) < 0.01 for n in counts.values()), counts
    assert all(len(models[name].config.pattern) == len(size.pattern) for name in ("hybrid", "attention", "mamba"))
    assert models["granite-64"].config.num_local_experts == 0


@needs_transformers
def test_a_name_may_carry_the_length_of_chunks():
    with torch.device("meta"):
        assert peers.build("mamba-128", TOY, 64).config.chunk_size == 128
        assert peers.build("mamba", TOY, 64).config.chunk_size == train.ModelConfig().chunk_size
        assert peers.build("granite-32", TOY, 64).config.mamba_chunk_size == 32


@needs_transformers
def test_decoding_times_every_new_token_of_either_library():
    for name in ("hybrid", "gpt2"):
        torch.manual_seed(0)
        model, prompt = peers.build(name, TOY, 32).eval(), torch.ones(1, 20, dtype=torch.long)
        with torch.no_grad():
            stamps = peers.continued(model, prompt, 5, "cpu")
        assert len(stamps) == 6 and stamps == sorted(stamps)
        found = peers.decoding(model, prompt, 5, "cpu")
        assert found["prefill"] > 0 and found["decoding"] > 0
        assert "decoding" not in peers.decoding(model, prompt, 1, "cpu")


def test_operations_of_a_step():
    """A model without layers that attend does 6 a parameter and token; attention adds its products, half a square."""
    plain = peers.utilisation(1000, 0, 16, 64, 10.0)
    assert plain == {"products": 60_000.0, "operations": 60_000.0}
    q = torch.randn(1, 1, 64, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.softmax(q @ q.mT, -1).matmul(q).sum().backward()
    full = counter.get_total_flops() / 64  # a token, each product over the whole square
    assert peers.utilisation(0, 1, 16, 64, 1.0)["operations"] == full / 2


def test_a_gpu_is_known_by_its_name(monkeypatch):
    for name, flops in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12),
                        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
                        ("Tesla T4", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peers.nominal_speed("cuda") == flops
    assert peers.nominal_speed("cpu") is None


@needs_transformers
@pytest.mark.kernels
def test_on_a_gpu_transformers_gets_the_same_kernels():
    """Its chunk scan and its state update are upstream's; its fused entry wants causal-conv1d and is out of the way."""
    import upstream

    try:
        upstream.missing(upstream.NEEDS)
        package = upstream.package_folder()
    except upstream.Unavailable as error:
        pytest.skip(f"upstream's kernels cannot be had: {error}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['causal_conv1d'] = None\n"
        "import train; from bench import peers\n"
        "kernels = train.load_triton()\n"
        "train.Runtime.start = lambda cfg: train.Runtime(None, None, kernels)\n"
        "peers.choose_kernels('cuda')\n"
        "from transformers.models.granitemoehybrid import modeling_granitemoehybrid as m\n"
        "of = lambda f: [c.cell_contents.__module__ for c in f.__closure__ if callable(c.cell_contents)][0]\n"
        "print(of(m.mamba2_chunk_scan), of(m.mamba2_selective_state_update))\n"
        "print(m.mamba2_split_conv1d_scan_combined(1, chunk_size=2), kernels.fused)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.splitlines() == [
        "mamba_ssm.ops.triton.ssd_combined mamba_ssm.ops.triton.selective_state_update", "None None"
    ]  # fmt: skip


# == what is said of the numbers =======================================================================================


def row(model, length, training, **more):
    return {"model": model, "length": length, "training": training} | more


def test_the_promises_out_of_medians():
    rows = [
        row("hybrid", 512, 900, decoding=100.0),
        row("hybrid", 1024, 1000, share=0.5),
        row("hybrid", 4096, 900, share=0.3, peak_gb=1.0, decoding=70.0),
        row("hybrid", 16384, 700),
        row("gpt2", 1024, 400),
        row("gpt2", 4096, 700),
        row("granite-64", 1024, 250),
        row("granite-256", 1024, 500),  # the best chunk is whichever is faster
        row("granite-64", 4096, 600, peak_gb=4.0),
        row("granite-256", 4096, 300, peak_gb=1.2),
        row("mamba", 1024, 900),
        row("mamba", 16384, 750),
        {"model": "gpt2", "length": 16384, "error": "out of memory"},
    ]
    table = [m.row() for m in peers.measures(rows, cuda=False)]
    assert {text: (measured, verdict) for text, _, _, measured, verdict in table} == {
        "training against GraniteMoeHybrid at its best chunk, T 1024": ("2.00x", "at least holds"),
        "training against GraniteMoeHybrid at its best chunk, T 4096": ("1.50x", "SHORT OF IT"),
        "training against GPT-2, T 1024": ("2.50x", "aim reached"),
        "training against GPT-2, T 4096": ("1.29x", "SHORT OF IT"),
        "training against GPT-2, T 16384": ("not run", ""),
        "share of the matmul peak, T 4096": ("30%", "at least holds"),
        "peak memory against GraniteMoeHybrid, T 4096": ("0.25x", "aim reached"),
        "time per token at 16384 over 1024, mamba": ("1.20x", "at least holds"),
        "time per token at 16384 over 1024, hybrid": ("1.43x", ""),
        "decoding at context 4096 over 512, hybrid": ("0.70x", "SHORT OF IT"),
    }
    assert [r[1:3] for r in table if "1024, mamba" in r[0]] == [["1.30x", "1.10x"]]


def test_on_a_gpu_only_mfu_has_an_aim():
    rows = [row("hybrid", 1024, 9e5, mfu=0.52), row("hybrid", 4096, 9e5, mfu=0.4)]
    found = peers.measures(rows, cuda=True)
    assert [m.text for m in found if m.aim] == ["MFU, T 1024", "MFU, T 4096"]
    assert [m.verdict() for m in found[-2:]] == ["aim reached", ""]


def test_medians_leave_out_what_failed():
    runs = {("a", 1): [{"training": 1.0, "kernels": "x"}, {"error": "out of memory"}, {"training": 4.0, "kernels": "x"},
                       {"training": 9.0, "kernels": "x"}], ("b", 1): [{"error": "out of memory"}]}  # fmt: skip
    a, b = peers.medians(runs)
    assert a == {"model": "a", "length": 1, "runs": 3, "training": 4.0, "kernels": "x"}
    assert b == {"model": "b", "length": 1, "runs": 0, "error": "out of memory"}
    with_numbers = a | {"parameters": 5, "peak_gb": 1.0, "share": 0.1, "mfu": 0.1}
    assert "out of memory" in peers.table([with_numbers, b], "a")


# == the scripts =======================================================================================================


@needs_transformers
def test_peers_leaves_numbers_a_plot_and_the_table(tmp_path):
    out = tmp_path / "new" / "peers.json"
    done = bench("peers.py", "--size", "toy", "--models", "hybrid", "gpt2", "--lengths", 32, "--tokens", 64, "--rounds",
                 1, "--steps", 1, "--decode", 3, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"] and found["torch"] == torch.__version__ and "--lengths 32" in found["command"]
    assert [(r["model"], r["length"], r["runs"]) for r in found["rows"]] == [("hybrid", 32, 1), ("gpt2", 32, 1)]
    for r in found["rows"]:
        assert r["training"] > 0 and r["decoding"] > 0 and r["prefill"] > 0 and 0 < r["step_gb"] < r["peak_gb"]
        products = 6 * r["parameters"] * r["training"] / r["peak_flops"]
        assert r["share"] == pytest.approx(products) and r["mfu"] > r["share"]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "share of the matmul peak, T 4096" in done.stdout


def test_a_model_that_fails_is_a_result(tmp_path, monkeypatch, capsys):
    """So that one that does not fit leaves the others' numbers."""
    numbers = {"parameters": 1, "training": 1.0, "peak_gb": 1.0, "share": 0.1, "mfu": 0.1}
    answer = {"hybrid": numbers, "gpt2": {"error": "out of memory"}}
    monkeypatch.setattr(peers, "alone", lambda script, spec: answer[spec["model"]])
    out = tmp_path / "peers.json"
    assert peers.main(["--models", "hybrid", "gpt2", "--lengths", "8", "--rounds", "1", "--out", str(out)]) == 1
    assert "out of memory" in capsys.readouterr().out
    assert [r.get("error") for r in json.loads(out.read_text())["rows"]] == [None, "out of memory"]


def test_the_models_take_turns_at_each_length(tmp_path, monkeypatch, capsys):
    speeds, asked = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0] * 2), []

    def alone(script, spec):
        asked.append((spec["length"], spec["model"]))
        return {"parameters": 1, "training": next(speeds), "peak_gb": 1.0, "share": 0.1, "mfu": 0.1}

    monkeypatch.setattr(peers, "alone", alone)
    out = tmp_path / "peers.json"
    assert peers.main(["--models", "mamba", "gpt2", "--lengths", "8", "16", "--out", str(out)]) == 0
    assert asked == [(length, model) for length in (8, 16) for _ in range(3) for model in ("mamba", "gpt2")]
    found = [(r["length"], r["model"], r["training"]) for r in json.loads(out.read_text())["rows"]]
    assert found == [(8, "mamba", 2.0), (8, "gpt2", 20.0), (16, "mamba", 2.0), (16, "gpt2", 20.0)]
    assert capsys.readouterr().out.count("0.10x") == 2, "the first model beside the other"


def test_a_process_that_fails_says_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nif sys.argv[2] == '1': raise MemoryError('no room')\nprint('noise')\nprint('{}')\n")
    assert peers.alone(str(script), 0) == {}
    assert peers.alone(str(script), 1) == {"error": "MemoryError: no room"}


def test_the_chunked_loss_takes_less_memory_and_says_the_same():
    """Real processes: 1,024 tokens of a vocabulary whose logits alone are 206 MB."""
    sizes = dict(vocab=50304, width=64, batch=1, length=1024)
    chunks, whole = (
        peers.alone(memory.__file__, dict(part="loss", kind=kind, sizes=sizes, device="cpu", steps=1))
        for kind in ("chunks", "whole logits")
    )
    assert chunks["first loss"] == pytest.approx(whole["first loss"], rel=1e-5)
    assert whole["bytes"] > 2 * 4 * 1024 * 50304 and chunks["bytes"] < whole["bytes"] / 2


@pytest.fixture
def restored():
    """What choose_kernels hides from transformers is seen again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mamba_ssm", "causal_conv1d"):
            patch.setitem(sys.modules, name, None)
        yield


@needs_transformers
def test_every_way_to_a_loss_is_the_same_loss(restored):
    """Ours in chunks and whole to the digit; GPT-2, with other weights, near the entropy of random tokens as well."""
    sizes = dict(vocab=3000, width=64, batch=2, length=32)
    steps = {way: memory.measure_step(way, sizes, "cpu", 1) for way in memory.STEPS}
    assert steps["chunks"]["first loss"] == pytest.approx(steps["whole logits"]["first loss"], abs=1e-5)
    assert steps["gpt2"]["first loss"] == pytest.approx(math.log(3000), abs=0.1)
    assert steps["gpt2"]["parameters"] == pytest.approx(steps["chunks"]["parameters"], rel=0.01)
    ways = [way for way in memory.LOSSES if "linear" not in way or hasattr(torch.nn, "LinearCrossEntropyOptions")]
    losses = {way: memory.measure_loss(way, sizes, "cpu", 1)["first loss"] for way in ways}
    assert max(losses.values()) - min(losses.values()) < 1e-4 and losses["chunks"] > 7


def test_the_ways_to_a_loss_beside_ours(tmp_path, monkeypatch, capsys):
    size = {"chunks": 1e8, "whole logits": 4e8, "gpt2": 5e8, "linear_cross_entropy": 2e8}
    rounds = iter([1, 9, 2] * 100)  # the median counts

    def alone(script, spec):
        many = next(rounds) if spec["kind"] == "chunks" else 2
        return {"bytes": many * size[spec["kind"]], "seconds": 0.5, "first loss": 1.0, "parameters": 5}

    monkeypatch.setattr(peers, "alone", alone)
    assert memory.main(["loss", "--out", str(tmp_path / "loss.json")]) == 0
    found = json.loads((tmp_path / "loss.json").read_text())
    assert {way: row["bytes"] for way, row in found["step"].items()} == {
        "chunks": 2e8, "whole logits": 8e8, "gpt2": 1e9}  # fmt: skip
    printed = capsys.readouterr().out
    assert "| transformers' GPT-2 " in printed and "| 1.000 |        5.00x |" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can refuse memory to a process")
def test_the_table_ends_cleanly_where_memory_does(tmp_path):
    out = tmp_path / "table.json"
    done = bench("memory.py", "table", "--block-size", 256, "--batch-sizes", 256, 2, 1, 512, "--steps", 1, "--limit-gb",
                 0.3, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    kept = [r for r in rows if not r["remat"]]
    assert [r["batch"] for r in kept] == [1, 2, 256], "ascending; nothing is tried behind the first that failed"
    assert [r.get("error") for r in kept] == [None, None, "out of memory"]
    assert 0 < kept[0]["gb"] <= kept[1]["gb"] < 0.3 and kept[1]["tokens_per_second"] > 0
    assert "not tried" in done.stdout and done.stdout.count("out of memory") >= 2


def test_batches_of_the_table_are_full_rows():
    model_cfg, cfg = train.make_config({"dataset": "arc", "preset": "small"}, has_gpu=False)
    x, y = memory.make_batch(model_cfg, cfg, 3)
    assert x.shape == y.shape == (3, 4096)
    tasks = (x == train.UNKNOWN_TASK).sum(1).tolist()
    assert tasks == [3, 3, 3] and (y != train.IGNORE_INDEX).float().mean() > 0.3
    model_cfg, cfg = train.make_config({"dataset": "fineweb", "preset": "nano"}, has_gpu=False)
    x, y = memory.make_batch(model_cfg, cfg, 2)
    assert x.shape == (2, 1024) and torch.equal(x[:, 1:], y[:, :-1])


def test_more_rows_take_more_memory_and_remat_less():
    """In one process, with the figures that the table prints."""
    given = {"dataset": "arc", "preset": "nano", "block_size": 1024}
    spec = dict(part="table", given=given, batches=[1, 8], device="cpu", steps=1,
                limit_gb=0.0)  # fmt: skip
    found = {}
    for remat in (False, True):
        done = bench("memory.py", "--one", json.dumps(spec | {"remat": remat}))
        found[remat] = [json.loads(line)["gb"] for line in done.stdout.splitlines()]
    assert found[False][1] > 1.5 * found[False][0] and found[True][1] < 0.75 * found[False][1], found


@needs_transformers
def test_decoding_by_context_and_batch(restored, tmp_path, capsys):
    out = tmp_path / "decode.json"
    flags = ["--size", "toy", "--contexts", "32", "8", "--batch-sizes", "1", "2", "--tokens", "3", "--rounds", "2"]
    assert decode.main([*flags, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["batch"], r["context"], r["model"]) for r in rows] == [
        (b, t, m) for b in (1, 2) for t in (8, 32) for m in decode.MODELS
    ]
    assert all(r["decoding"] > 0 and r["prefill"] > 0 for r in rows)
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[2][5:]] == ["100%"] * 3, "each model beside its shortest context"


@pytest.mark.parametrize("script, flags, said", [
    (peers, ["--models", "granit"], "peers.py: argument --models: 'granit' is none of hybrid, attention, mamba, gpt2"),
    (peers, ["--models", "gpt2-64"], "peers.py: argument --models: 'gpt2-64'"),
    (peers, ["--lengths", "0"], "peers.py: argument --lengths: '0' is not a whole number of at least 1"),
    (memory, ["table", "--preset", "huge"], "memory.py: --preset 'huge' is none of arc's: nano, small, base"),
    (memory, ["table", "--limit-gb", "-1"], "memory.py: --limit-gb -1.0 must be at least 0"),
    (memory, ["loss", "--width", "100"], "memory.py: --width 100 must be a multiple of 64"),
    (memory, [], "memory.py: the following arguments are required"),
    (decode, ["--tokens", "1"], "decode.py: --tokens 1: there is no time between one token and the next"),
])  # fmt: skip
def test_bad_input_gets_one_line(script, flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "out.json"] if flags else []
    try:
        code = script.main([*flags, *out])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(said) and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_and_a_missing_device_are_named(tmp_path, capsys, monkeypatch):
    for script, flags in ((peers, []), (memory, ["loss"]), (memory, ["table"]), (decode, [])):
        assert script.main([*flags, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"{script.__name__[6:]}.py: --out {tmp_path}: no file can be written there\n"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert script.main([*flags, "--device", "cuda", "--out", str(tmp_path / "x.json")]) == 2
        assert "--device cuda: PyTorch" in capsys.readouterr().err


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "alone", interrupted)
    assert peers.main(["--out", str(tmp_path / "x.json")]) == 130
    assert capsys.readouterr().err == "peers.py: stopped\n"
