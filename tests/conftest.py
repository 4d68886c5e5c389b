"""What every test file may rely on: the repository on the path, two threads, no network, the official ARC tasks."""

import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported; processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"  # a look-up without a network retries for 23 seconds

# The same examples in every run, and no time limit for one of them: the machine may be busy.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_sessionstart(session: pytest.Session) -> None:
    """As many threads on every machine, so that the order of sums, and with it every number, is the same.

    No signal is ignored, as in a shell's background or behind nohup: processes that tests start would inherit that.
    """
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if signal.getsignal(number := getattr(signal, name, signal.SIGINT)) == signal.SIG_IGN:
            signal.signal(number, default)
    try:
        import torch
    except ImportError:
        return  # the tests that need it say so themselves
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def arc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ARC-AGI-1: a folder that holds training/ and evaluation/. Shared by all tests: only read it."""
    from arc_data.prepare import prepare

    return prepare("arcagi", tmp_path_factory.mktemp("arc"))


@pytest.fixture(scope="session")
def arc2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ARC-AGI-2, in the same layout. Shared by all tests: only read it."""
    from arc_data.prepare import prepare

    return prepare("arcagi2", tmp_path_factory.mktemp("arc2"))
