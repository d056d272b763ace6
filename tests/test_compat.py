"""The names of DeepEP: what resolves, what does not exist, who may have them, and a client that uses them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

import tokenferry
from tests.conftest import PoolOf
from tokenferry import TokenferryError, compat

ROOT = Path(__file__).parent.parent
DISTRIBUTION = ROOT / "compat-dist"

SPELLINGS = {
    "deep_ep": ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t"],
    "deep_ep.buffer": ["Buffer", "Config", "EventHandle", "EventOverlap", "check_nvlink_connections"],
    "deep_ep.buffers.elastic": ["EPHandle", "ElasticBuffer"],
    "deep_ep.buffers.legacy": ["Buffer"],
    "deep_ep.legacy": ["Buffer"],
    "deep_ep.utils": ["Config", "EventHandle", "EventOverlap", "check_nvlink_connections"],
    "deep_ep.utils.event": ["EventHandle", "EventOverlap"],
    "deep_ep_cpp": ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"],
}
FUNCTIONS = ["check_nvlink_connections", "get_low_latency_rdma_size_hint", "is_sm90_compiled"]
ABSENT_NAMES = [
    "HybridEPBuffer",
    "get_logical_domain_size",
    "get_physical_domain_size",
]
ABSENT_MODULES = ["deep_ep.hybrid_ep_buffer", "deep_ep._C"]

CHECK = """
import importlib, importlib.util, json, sys, time
import torch
wanted = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        wanted.append(name.partition(".")[0])
sys.meta_path.insert(0, Watch())
started = time.process_time()
{start}
assert importlib.util.find_spec("deep_ep") and importlib.util.find_spec("deep_ep_cpp")
import deep_ep
import deep_ep_cpp
seconds = time.process_time() - started
import deep_ep.buffers.legacy, deep_ep.utils.event
import tokenferry
for name, attributes in {spellings}.items():
    module = importlib.import_module(name)
    assert module.__spec__.name == name == module.__name__, name
    assert importlib.util.find_spec(name) is module.__spec__, name
    parent, _, last = name.rpartition(".")
    assert not parent or getattr(sys.modules[parent], last) is module, name
    for attribute in attributes:
        scope = {{}}
        exec(f"from {{name}} import {{attribute}}", scope)
        if attribute in {functions}:
            assert callable(scope[attribute]), (name, attribute)
        else:
            assert scope[attribute] is getattr(tokenferry, attribute), (name, attribute)
assert not [name for name in {absent} if hasattr(deep_ep, name)]
for name in ["deep_ep", "deep_ep.utils", "deep_ep_cpp"]:
    importlib.reload(sys.modules[name])
assert deep_ep.Buffer is deep_ep.buffer.Buffer is tokenferry.Buffer
print(json.dumps({{
    "seconds": seconds,
    "heavy": sorted({{"matplotlib", "tqdm", "numpy", "triton", "pandas"}} & set(wanted)),
    "cuda": torch.cuda.is_initialized(),
    "where": deep_ep.__file__,
    "version": deep_ep.__version__,
}}))
"""


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the distribution in it, built from this repository and unpacked."""
    base = tmp_path_factory.mktemp("distribution")
    shutil.copytree(DISTRIBUTION, base / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(base)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=base / "source", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = base.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(base / "site")
    return base / "site"


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )


def check(start: str, *path: Path, most: float = 0.3) -> dict[str, Any]:
    """Import everything in a process of its own: cheap, if only once in three times on a busy machine.

    ``most``: seconds of a core, beyond torch.
    """
    program = CHECK.format(start=start, spellings=SPELLINGS, functions=FUNCTIONS, absent=ABSENT_NAMES)
    times = []
    for _ in range(3):
        done = run(program, *path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        result: dict[str, Any] = json.loads(done.stdout)
        assert result["heavy"] == []
        assert result["cuda"] is False
        times.append(result["seconds"])
        if times[-1] < most:
            return result
    pytest.fail(f"import deep_ep took {times} s of a core beyond torch")


def distribution_in(directory: Path, name: str, version: str) -> None:
    """Let importlib.metadata find a distribution."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


# Without the distribution.


def test_every_spelling_resolves_in_a_fresh_process() -> None:
    result = check("import tokenferry.compat; tokenferry.compat.install()")
    assert Path(result["where"]) == ROOT / "tokenferry" / "compat" / "deep_ep" / "__init__.py"


@pytest.mark.usefixtures("installed")
def test_what_is_not_there_does_not_resolve() -> None:
    deep_ep = importlib.import_module("deep_ep")
    for name in ABSENT_NAMES:
        assert not hasattr(deep_ep, name)
        with pytest.raises(ImportError, match=name):
            exec(f"from deep_ep import {name}")
    for name in ABSENT_MODULES:
        assert importlib.util.find_spec(name) is None


@pytest.mark.usefixtures("installed")
def test_objects_pickle() -> None:
    deep_ep = importlib.import_module("deep_ep")
    values = (deep_ep.Buffer, deep_ep.Config(20, 8, 256), deep_ep.topk_idx_t)
    assert pickle.loads(pickle.dumps(values)) == (tokenferry.Buffer, tokenferry.Config(20, 8, 256), torch.int64)


@pytest.mark.usefixtures("installed")
def test_version_says_whose_it_is() -> None:
    version = Version(importlib.import_module("deep_ep").__version__)
    assert Version("1.2.1") <= version < Version("1.2.2") < Version("2")
    assert version.public == "1.2.1"
    assert version.local == f"tokenferry.{tokenferry.__version__}"


def test_install_and_uninstall_leave_no_trace() -> None:
    before = list(sys.meta_path)
    compat.uninstall()
    for _ in range(2):
        compat.install()
    assert len(sys.meta_path) == len(before) + 1
    assert importlib.import_module("deep_ep.utils").EventOverlap is tokenferry.EventOverlap
    compat.uninstall()
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.startswith("deep_ep")]
    assert importlib.util.find_spec("deep_ep") is None


@pytest.mark.parametrize("file", ["deep_ep/__init__.py", "deep_ep/stray.py", "deep_ep_cpp.py"])
def test_install_refuses_what_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    name = file.partition("/")[0].removesuffix(".py")
    with pytest.raises(TokenferryError, match=rf"another {name} is there, at .*{tmp_path}"):
        compat.install()
    assert sys.meta_path == before
    compat.uninstall()
    assert importlib.util.find_spec(name) is not None


def test_install_refuses_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("deep_ep")
    other.__file__ = "/somewhere/deep_ep/__init__.py"
    monkeypatch.setitem(sys.modules, "deep_ep", other)
    with pytest.raises(TokenferryError, match=r"another deep_ep is imported already, from /somewhere/deep_ep/"):
        compat.install()
    compat.uninstall()
    assert sys.modules["deep_ep"] is other


# With the distribution.


def test_distribution_is_of_this_version() -> None:
    project = tomllib.loads((DISTRIBUTION / "pyproject.toml").read_text())["project"]
    assert project["name"] == compat.DISTRIBUTION
    assert project["version"] == tokenferry.__version__
    assert project["dependencies"] == [f"tokenferry=={tokenferry.__version__}"]


def test_distribution_resolves_every_spelling(site: Path) -> None:
    result = check("", site, most=3.0)  # files of a new folder are compiled first
    assert Path(result["where"]) == site / "deep_ep" / "__init__.py"
    assert Version(result["version"]).local == f"tokenferry.{tokenferry.__version__}"


TYPED = """
from typing import assert_type
import deep_ep, deep_ep_cpp, tokenferry, torch
from deep_ep import Buffer, ElasticBuffer
from deep_ep.buffer import Config
from deep_ep.buffers.elastic import EPHandle
from deep_ep.buffers.legacy import Buffer as legacy
from deep_ep.legacy import Buffer as newer
from deep_ep.utils import EventOverlap, check_nvlink_connections
from deep_ep.utils.event import EventHandle
from tokenferry.handles import Handle
Scaled = tuple[torch.Tensor, torch.Tensor]
def calls(buffer: Buffer, x: torch.Tensor, scaled: Scaled, either: torch.Tensor | Scaled) -> None:
    rows, _, _, counts, handle, event = buffer.dispatch(x, topk_idx=x)
    assert_type((rows, counts, handle), tuple[torch.Tensor, list[int], Handle])
    assert_type(buffer.dispatch(scaled, handle)[:2], tuple[Scaled, None])
    assert_type(buffer.dispatch(either)[0], torch.Tensor | Scaled)
    assert_type(event, EventOverlap)
assert_type(legacy(), tokenferry.Buffer)
assert_type(newer(), tokenferry.Buffer)
assert_type(deep_ep.utils.EventOverlap(), EventOverlap)
assert_type(deep_ep_cpp.get_low_latency_rdma_size_hint(1, 2, 3, 4), int)
"""


def test_distribution_says_that_it_is_typed(site: Path) -> None:
    for path in ("deep_ep/py.typed", "deep_ep_cpp/py.typed"):
        assert (site / path).exists()
    for name in SPELLINGS:
        path = site.joinpath(*name.split("."))
        files = path.with_suffix(".pyi"), path / "__init__.pyi", path / "__init__.py"
        assert any(file.exists() for file in files), name


@pytest.mark.slow
def test_types_of_the_distribution(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    client = tmp_path / "client.py"
    client.write_text(TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", client], env={**os.environ, "MYPYPATH": str(site)}, cwd=ROOT,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_install_beside_the_distribution_does_nothing(site: Path) -> None:
    program = "import sys, tokenferry.compat as c; before = list(sys.meta_path); c.install(); import deep_ep; "
    done = run(program + "assert sys.meta_path == before; print(deep_ep.__file__)", site)
    assert done.stdout.strip() == str(site / "deep_ep" / "__init__.py"), done.stderr


@pytest.mark.slow
def test_distribution_refuses_to_be_beside_another(site: Path, tmp_path: Path) -> None:
    distribution_in(tmp_path, "deep_ep", "1.2.1+567632d")
    program = """
for name in ("deep_ep", "deep_ep_cpp", "deep_ep.utils"):
    try:
        __import__(name)
    except ImportError as error:
        print(error)
"""
    done = run(program, site, tmp_path)
    assert done.stderr == ""
    messages = done.stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert message.startswith("both tokenferry-deep-ep and deep_ep 1.2.1+567632d")
        assert "pip uninstall tokenferry-deep-ep deep_ep" in message


@pytest.mark.parametrize("name", ["deep_ep", "sgl_deep_ep"])
def test_other_distributions_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compat.check_alone()
    distribution_in(tmp_path, name, "1.0.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"{name} 1.0.0"):
        compat.check_alone()


# A client: autograd functions around dispatch and combine, as training frameworks have them.


def client(rank: int, num_ranks: int) -> None:
    """Forward and backward on one rank, with the imports and the calls of Megatron's fused_a2a."""
    compat.install()
    try:
        from deep_ep import Buffer  # type: ignore[import-not-found]
        from deep_ep.utils import EventHandle, EventOverlap  # type: ignore[import-not-found]

        with pytest.raises(ImportError):
            from deep_ep import HybridEPBuffer  # noqa: F401

        check_client(rank, num_ranks, Buffer, EventHandle, EventOverlap)
    finally:
        compat.uninstall()


def check_client(rank: int, num_ranks: int, Buffer: Any, EventHandle: Any, EventOverlap: Any) -> None:
    num_tokens, hidden, num_experts, num_topk = 40 + rank, 64, 4 * num_ranks, 3
    group = dist.group.WORLD
    flags = {"async_finish": True, "allocate_on_comm_stream": True}
    source = torch.Generator().manual_seed(rank)
    x = torch.randint(-8, 8, (num_tokens, hidden), generator=source).bfloat16().requires_grad_()
    ids = torch.rand(num_tokens, num_experts, generator=source).topk(num_topk).indices
    ids[::5, 0] = -1  # dropped for want of capacity
    ids[7] = -1
    probs = torch.rand(num_tokens, num_topk, generator=source).requires_grad_()

    hidden_bytes = x.size(1) * max(x.element_size(), 2)
    num_nvl_bytes = num_rdma_bytes = 0
    Buffer.set_num_sms(20)
    for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        num_nvl_bytes = max(num_nvl_bytes, config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks))
        num_rdma_bytes = max(num_rdma_bytes, config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks))
    buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    assert buffer.group == group
    assert buffer.num_nvl_bytes >= num_nvl_bytes
    assert buffer.num_rdma_bytes >= num_rdma_bytes

    def previous_event() -> Any:
        return EventOverlap(EventHandle())

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, ids: Any, probs: Any) -> Any:
            per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
                ids, num_experts, previous_event=previous_event(), **flags
            )
            recv_x, recv_ids, recv_probs, counts, handle, event = buffer.dispatch(
                x,
                topk_idx=ids,
                topk_weights=probs,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                previous_event=event,
                **flags,
            )
            event.current_stream_wait()
            ctx.handle = handle
            return recv_x, recv_ids, recv_probs, torch.tensor(counts), handle

        @staticmethod
        def backward(ctx: Any, grad: Any, _ids: Any, grad_probs: Any, *_: Any) -> Any:
            grad_x, grad_probs, event = buffer.combine(
                grad.contiguous(),
                ctx.handle,
                topk_weights=grad_probs.float(),
                previous_event=previous_event(),
                **flags,
            )
            event.current_stream_wait()
            return grad_x, None, grad_probs

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Any, handle: Any) -> Any:
            combined, _, event = buffer.combine(rows, handle=handle, previous_event=previous_event(), **flags)
            event.current_stream_wait()
            ctx.handle = handle
            return combined

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            rows, *_, event = buffer.dispatch(
                grad.contiguous(), handle=ctx.handle, previous_event=previous_event(), **flags
            )
            event.current_stream_wait()
            return rows, None

    recv_x, recv_ids, recv_probs, counts, handle = Dispatch.apply(x, ids, probs)  # type: ignore[no-untyped-call]
    assert isinstance(handle, tuple)
    assert counts.tolist() == [int((recv_ids == expert).sum()) for expert in range(num_experts // num_ranks)]
    y = Combine.apply(recv_x * 2, handle)  # type: ignore[no-untyped-call]
    (y.sum() + (recv_probs * (recv_ids >= 0)).sum()).backward()

    owners = torch.where(ids >= 0, ids // (num_experts // num_ranks), -1)
    copies = torch.stack([(owners == peer).any(1) for peer in range(num_ranks)]).sum(0).unsqueeze(1)
    assert torch.equal(y, (2 * copies * x).bfloat16())
    assert x.grad is not None
    assert probs.grad is not None
    assert torch.equal(x.grad, (2 * copies).expand(-1, hidden).bfloat16())
    assert torch.equal(probs.grad, (ids >= 0).float())
    buffer.destroy()


def test_training_client(pool_of: PoolOf) -> None:
    pool_of(2).run(client)
