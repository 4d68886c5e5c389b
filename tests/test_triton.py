"""extras/triton_kernels.py against train.py's plain functions, in Triton's interpreter, which knows no bfloat16.

Triton reads TRITON_INTERPRET when it is first imported, so one test runs, in a process of its own, the others, those
that tests/test_kernels.py has for any table, and what tests/test_mamba.py compares with upstream's kernels.
"""

import sys
from pathlib import Path

import pytest
import torch
import upstream
from upstream import INTERPRETED, interpreter, relative_error  # noqa: F401

from train import PLAIN


@pytest.mark.kernels
def test_in_the_interpreter():
    names = "test_mamba.py::TestUpstream", "test_kernels.py::TestFunctions", "test_triton.py::TestInterpreted"
    tests = [Path(__file__).with_name(name) for name in names]
    done = upstream.call(sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests, timeout=900,
                         OMP_NUM_THREADS="1", **upstream.settings())  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped" in done.stdout:
        pytest.skip(done.stdout)


class TestInterpreted:
    __test__ = INTERPRETED

    def test_half_precision(self):
        """float16 in, float16 out, sums in float32."""
        from extras import triton_kernels as ours

        torch.manual_seed(0)
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
