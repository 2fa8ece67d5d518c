"""What every test shares: how torch runs, and a small real model with its tokenizer, made on the spot."""

import gc
import random
import signal
from collections.abc import Iterator

from tests import devices  # isort: skip  (before anything that imports Triton)

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from mpt.backends.native.library import Unavailable, features
from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.warm_ranks import Ranks

torch.set_num_threads(1)  # tiny models are faster on one thread, and machines that test are busy


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(50_000, 10, 10)  # as mpt/command_line.py: else what all tests import is looked through for cycles
    devices.choose(config.option.markexpr)
    _let_children_hear()


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported stays, so no test looks for cycles in it


def _let_children_hear() -> None:
    """What is ignored here is ignored by processes that tests start; a handler is not inherited.

    `nohup make test &` has both signals ignored, and tests send them.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test, and the fixtures made for it, begins with the same random numbers, alone and in company."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


SPECIALS = ("<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> RawTokenizer:
    """One token a byte behind the four special ones: 260 tokens, so half characters are the rule."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIALS))
    return raw


# Files that start a Ray. One process has them all: two that start at once on two cores wait longer than Ray waits.
ON_RAY = ("serving/cluster/test_cluster.py", "serving/test_acceptance.py", "serving/cluster/test_deaths.py")
# Files that ask `real_server` of demos/conftest.py, which loads five models. One process has them all, and starts one.
ON_REAL_SERVER = (
    "demos/test_chat_browser.py",
    "demos/test_chat_presenter.py",
    "demos/test_instruct_browser.py",
    "demos/test_space.py",
    "demos/test_storywriter_browser.py",
)
# Files that take longest, the longest first: handed out first, they leave no process waiting for another at the end.
LONGEST = (
    *ON_RAY,
    "training/test_distributed.py",
    "training/test_loop.py",
    *ON_REAL_SERVER,
    "benchmarks/test_engine_ladder.py",
    "serving/test_server.py",
    "mpt/backends/test_sharded_backend.py",
    "mpt/backends/test_int8_cache.py",
    "mpt/backends/test_native.py",
    "mpt/backends/test_paged_backend.py",
    "demos/test_cli.py",
)


class _FilesTogether(LoadFileScheduling):
    """`--dist loadfile`, with the files of ON_RAY as one, and those of ON_REAL_SERVER."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((group[0] for group in (ON_RAY, ON_REAL_SERVER) if file.removeprefix("tests/") in group), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    return _FilesTogether(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0].removeprefix("tests/"), len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which variants of the C code this machine could not run, where their tests were to run."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if not any(getattr(report, "nodeid", "").startswith("tests/mpt/backends/test_native.py") for report in reports):
        return
    try:
        missing = [f"{variant} ({reason})" for variant, reason in features().missing.items()]
    except Unavailable as reason:
        missing = [f"all of it ({reason})"]
    if missing:
        terminalreporter.write_line(f"C code not tested here: {', '.join(missing)}")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def model() -> MPTForCausalLM:
    """2 layers, 64 wide, 4 heads, float32, weights from seed 0."""
    torch.manual_seed(0)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=260, max_seq_len=2048)
    return MPTForCausalLM(config).eval()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    warm = Ranks()
    yield warm
    warm.close()
