"""extras/triton_kernels.py against train.py's plain functions: in Triton's interpreter, and on a GPU.

Triton reads TRITON_INTERPRET when it is first imported, so one test runs `TestInterpreted` in a process of its own.
float32 throughout: the interpreter knows no bfloat16.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import relative_error

import train
from train import IGNORE_INDEX, PLAIN, Film, Ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)


@pytest.mark.kernels
def test_in_the_interpreter():
    """Runs the class below."""
    required = os.environ.get("CI", "").lower() == "true" or os.environ.get("REQUIRE_KERNELS") == "1"
    try:
        upstream.missing(upstream.NEEDS)
        where = {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1", "TRITON_F32_DEFAULT": "ieee",
                 "CUDA_VISIBLE_DEVICES": "", "UPSTREAM_PACKAGE": str(upstream.package_folder()),
                 "OMP_NUM_THREADS": "1"}  # fmt: skip
    except upstream.Unavailable as error:
        (pytest.fail if required else pytest.skip)(f"Triton's kernels cannot run: {error}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted"]
    done = subprocess.run(command, env=os.environ | where, cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=600)  # fmt: skip
    if "UNAVAILABLE" in done.stdout and not required:
        pytest.skip(done.stdout.split("UNAVAILABLE")[1].splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
def test_the_trial_passes_on_a_gpu():
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("REQUIRE_GPU") == "1" else pytest.skip)("PyTorch sees no CUDA device")
    from extras.triton_kernels import make_ops

    make_ops(PLAIN, strict=True)


def compare(name, tensors, call, forward=1e-5, gradient=1e-4):
    """Result and gradients of call(function, *tensors) with our function and with the plain one of that name."""
    from extras import triton_kernels

    results = []
    for table in (PLAIN, triton_kernels):
        inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        y = call(getattr(table, name), *inputs)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        learn = [t for t in inputs if t.requires_grad]
        results.append([y, *torch.autograd.grad((y * weight).sum(), learn)])
    assert results[0][0].dtype == results[1][0].dtype
    errors = [relative_error(ours, plain) for plain, ours in zip(*results, strict=True)]
    assert errors[0] < forward and max(errors) < gradient, errors


def ids_of(b, t, documents):
    """Ascending ids (b, t) of so many documents a row, of unequal lengths."""
    cuts = torch.rand(b, t, generator=torch.Generator().manual_seed(t)).argsort(1) < documents - 1
    return cuts.long().cumsum(1) - cuts[:, :1].long()


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True, scope="class")
    def upstream_on_the_path(self):
        if fault := upstream.interpreter_fault():
            pytest.exit(f"UNAVAILABLE {fault}", returncode=1)
        upstream.import_kernels()
        torch.manual_seed(0)

    @few
    @given(st.integers(1, 3), st.integers(1, 150), st.sampled_from([8, 33, 64]), st.booleans(), st.integers(1, 5))
    def test_rms_norm(self, b, t, d, gated, documents):
        x, weight = torch.randn(b, t, 2 * d + 3), torch.rand(d)
        if gated:  # both are columns of one tensor
            return compare("rms_norm", (x, weight), lambda f, x, w: f(x[..., 3 : d + 3], w, 1e-5, gate=x[..., d + 3 :]))
        table, tasks = torch.randn(7, 4 * d), ids_of(b, t, documents) * 3 % 7
        compare("rms_norm", (x, weight), lambda f, x, w: f(x[..., :d], w, 1e-5))
        compare("rms_norm", (x, weight, table),
                lambda f, x, w, v: f(x[..., :d], w, 1e-5, film=Film(v[:, d : 3 * d], tasks)))  # fmt: skip

    def test_a_film_for_each_row(self):
        tasks = torch.tensor([[2], [0]])
        compare("rms_norm", (torch.randn(2, 70, 16), torch.rand(16), torch.randn(3, 32)),
                lambda f, x, w, v: f(x, w, 1e-5, film=Film(v, tasks)))  # fmt: skip

    @few
    @given(st.integers(1, 2), st.integers(1, 70), st.sampled_from([8, 70]), st.integers(2, 4), st.integers(0, 5))
    def test_causal_conv(self, b, t, c, taps, documents):
        from extras import triton_kernels

        triton_kernels.TIME = 32
        ids = ids_of(b, t, documents) if documents else None
        tensors = torch.randn(b, t, c + 5), torch.randn(c, taps), torch.randn(c)
        compare("causal_conv", tensors, lambda f, x, w, v: f(x[..., 2 : c + 2], w, v, ids))

    @few
    @given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 24, 700]))
    def test_swiglu(self, b, t, d):
        compare("swiglu", (torch.randn(b, t, 2 * d + 1),), lambda f, x: f(x[..., 1:]))

    @few
    @given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.sampled_from([2, 20, 64]), st.booleans())
    def test_rotary(self, b, t, h, p, one):
        angle = torch.randn(1 if one else b, t, p // 2)
        for x, view in (
            (torch.randn(b, t, 3 * h, p), lambda x: x[:, :, h : 2 * h]),
            (torch.randn(b, h, t, p), lambda x: x.transpose(1, 2)),
        ):
            compare("rotary", (x,), lambda f, x, view=view: f(view(x), angle.cos(), angle.sin()))

    @few
    @given(st.integers(1, 20), st.sampled_from([16, 300, 5000]), st.sampled_from([2**9, 2**27]))
    def test_linear_cross_entropy(self, n, v, chunk):
        from extras import triton_kernels

        triton_kernels.LOGITS = chunk
        targets = torch.randint(0, v, (n,)).masked_fill(torch.arange(n) % 3 == 1, IGNORE_INDEX)
        tensors = torch.randn(n, 24), torch.randn(v, 24)
        compare("linear_cross_entropy", tensors, lambda f, h, w: f(h, w, targets))
        compare("linear_cross_entropy", tensors, lambda f, h, w: f(h, w.detach(), targets) + 0 * w.sum())
        with torch.no_grad():
            assert triton_kernels.linear_cross_entropy(*tensors, targets) == pytest.approx(
                PLAIN.linear_cross_entropy(*tensors, targets).item(), rel=1e-5)  # fmt: skip

    def test_half_precision(self):
        """float16 in, float16 out, sums in float32."""
        from extras import triton_kernels as ours

        x, gate, weight, taps = torch.randn(2, 30, 64), torch.randn(2, 30, 64), torch.rand(64), torch.randn(64, 4)
        cos, sin, head = weight[:16].expand(1, 30, 16), weight[16:32].expand(1, 30, 16), torch.randn(12, 64)
        for call in (
            lambda f, x: f.rms_norm(x, weight, 1e-5, gate=gate.to(x.dtype)),
            lambda f, x: f.causal_conv(x, taps, weight),
            lambda f, x: f.swiglu(x),
            lambda f, x: f.rotary(x.unflatten(-1, (2, 32)), cos, sin),
            lambda f, x: f.linear_cross_entropy(x[0], head.to(x.dtype), torch.arange(30) % 12),
        ):
            single, half = x.clone().requires_grad_(), x.half().requires_grad_()
            plain, result = call(PLAIN, single), call(ours, half)
            plain.sum().backward()
            result.sum().backward()
            assert result.dtype == (torch.float16 if result.dim() else torch.float32)
            assert half.grad.dtype == torch.float16
            assert relative_error(result, plain) < 2e-3 and relative_error(half.grad, single.grad) < 1e-2

    def test_under_autocast_a_norm_writes_what_the_product_reads(self):
        from extras import triton_kernels as ours

        x, weight = torch.randn(1, 5, 16, requires_grad=True), torch.rand(16)
        with torch.autocast("cpu", torch.float16):
            y = ours.rms_norm(x, weight, 1e-5)
        y.sum().backward()
        assert y.dtype == torch.float16 and x.grad.dtype == torch.float32
        assert torch.equal(y, PLAIN.rms_norm(x, weight, 1e-5).half())

    @pytest.mark.parametrize("grid", [True, False], ids=["grids, packed", "text"])
    def test_whole_model(self, grid):
        """Loss and gradients of every parameter; for grids with --remat."""
        from extras import triton_kernels

        ours = {name: getattr(triton_kernels, name) for name in Ops._fields if hasattr(triton_kernels, name)}
        ops = PLAIN._replace(**ours | {"ssd_scan": PLAIN.ssd_scan})  # upstream's has tests of its own
        sizes = dict(d_model=32, pattern="MA", n_head=2, d_state=16, headdim=16, d_ff=48, chunk_size=16, block_size=512)
        kind = dict(vocab_size=16, n_tasks=3, tie_embeddings=False, document_token=16) if grid else dict(vocab_size=50)
        torch.manual_seed(0)
        model = train.GPT(train.ModelConfig(**sizes, **kind, grid=grid))
        upstream.randomise(model)
        document = [17, 11, 1, 2, 10, 3, 4, 10, 12, 5, 6, 10, 13, 11, 7, 10, 12, 8, 10, 13]
        tokens = torch.tensor([document + [18, *document[1:]], document + [16, *document[1:]]])
        targets = tokens.roll(-1, 1).masked_fill(tokens.roll(-1, 1) > 15, IGNORE_INDEX)
        losses, gradients = [], []
        for table, remat in ((PLAIN, False), (ops, grid)):
            model.use(table)
            model.remat = remat
            model.zero_grad()
            losses.append(model(tokens, targets)[1])
            losses[-1].backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert relative_error(losses[1], losses[0]) < 1e-5
        errors = {name: relative_error(gradients[1][name], g) for name, g in gradients[0].items()}
        assert max(errors.values()) < 1e-4, errors

    def test_what_fails_its_trial_is_replaced_and_named(self, monkeypatch):
        from extras import triton_kernels as ours

        ours.make_ops(PLAIN, torch.device("cpu"), strict=True)  # upstream's scan among them

        def refuse(*args, **kwargs):
            raise ImportError("no\nptxas here")

        monkeypatch.setattr(ours, "swiglu", lambda x: PLAIN.swiglu(x) * 1.1)
        monkeypatch.setattr(ours, "ssd_scan", refuse)
        ops = ours.make_ops(PLAIN, torch.device("cpu"))
        assert ops.swiglu is PLAIN.swiglu and ops.ssd_scan is PLAIN.ssd_scan and ops.rotary is ours.rotary
        assert "plain PyTorch for ssd_scan: ImportError: ptxas here; swiglu: differs from the plain one by" in ops.name
        with pytest.raises(RuntimeError, match="ptxas here"):
            ours.make_ops(PLAIN, torch.device("cpu"), strict=True)
